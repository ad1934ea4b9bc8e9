"""Who goes where: routers choose, placement enforces capacity, health measures."""

from sparse_lm.routing.choice import Routing as Routing
from sparse_lm.routing.choice import TokenChoice as TokenChoice
from sparse_lm.routing.placement import Placement as Placement
from sparse_lm.routing.placement import place as place
from sparse_lm.routing.router import Router as Router
from sparse_lm.routing.switch import Switch

ROUTERS: dict[str, type[Router]] = {"switch": Switch}
