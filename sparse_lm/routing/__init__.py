"""Who goes where: routers choose, placement enforces capacity, health measures."""

from sparse_lm.routing.choice import Choice as Choice
from sparse_lm.routing.choice import ExpertChoice as ExpertChoice
from sparse_lm.routing.choice import Replay as Replay
from sparse_lm.routing.choice import Routing as Routing
from sparse_lm.routing.choice import SoftSlots as SoftSlots
from sparse_lm.routing.choice import TokenChoice as TokenChoice
from sparse_lm.routing.choice import chosen_indices as chosen_indices
from sparse_lm.routing.choice import indices_to_replay as indices_to_replay
from sparse_lm.routing.leak import leak as leak
from sparse_lm.routing.placement import Placement as Placement
from sparse_lm.routing.placement import place as place
from sparse_lm.routing.placement import rank as rank
from sparse_lm.routing.router import Router as Router
from sparse_lm.routing.table import ROUTERS as ROUTERS
from sparse_lm.routing.table import router_of as router_of
