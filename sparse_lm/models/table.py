"""The kinds of attention and of feed-forward layers: the names that a config may use."""

from flax import nnx

from sparse_lm.models.attention import FullAttention
from sparse_lm.models.block_sparse import BlockSparse
from sparse_lm.models.expert_layer import ExpertLayer
from sparse_lm.models.feed_forward import FeedForward

# (model, rngs, *, options) -> module
ATTENTIONS: dict[str, type[nnx.Module]] = {"full": FullAttention}

# (model, hidden width, rngs, *, options) -> module
FEED_FORWARDS: dict[str, type[nnx.Module]] = {"dense": FeedForward, "experts": ExpertLayer, "blocks": BlockSparse}
