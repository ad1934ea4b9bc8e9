"""One row for each of what is added: the table it enters, its name there, and a config that uses it."""

from sparse_lm.config import choice
from sparse_lm.models.table import ATTENTIONS, FEED_FORWARDS
from sparse_lm.routing import ROUTERS
from tests.added.low_rank import LowRank
from tests.added.momentum import Momentum
from tests.added.windowed import WindowedAttention

ADDED = {
    "router": (ROUTERS, "momentum", Momentum, {"model__router": choice("momentum", decay=0.5)}),
    "attention": (ATTENTIONS, "windowed", WindowedAttention, {"model__attention": choice("windowed", window=5)}),
    "feed-forward": (FEED_FORWARDS, "low_rank", LowRank, {"model__feed_forward": choice("low_rank", rank=8)}),
}
FIELDS = {name: ({} if name == "feed-forward" else {"model__experts": 4}) | row[3] for name, row in ADDED.items()}


def add() -> None:
    """Enters all of them."""
    for table, name, kind, _ in ADDED.values():
        table[name] = kind
