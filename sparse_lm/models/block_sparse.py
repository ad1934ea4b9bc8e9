"""A feed-forward layer whose matrices are made of the blocks that exist (Gray, Radford and Kingma 2017)."""

from flax import nnx

from sparse_lm import config as configs
from sparse_lm.kernels.block_sparse import block_sparse_matmul
from sparse_lm.layouts import build_layout
from sparse_lm.models.feed_forward import FeedForward
from sparse_lm.parameter import init_matrix


class BlockSparse(FeedForward):
    """Each weight is the blocks of a matrix that `model.layout` keeps, [num_blocks, block, block]."""

    def __init__(self, model: configs.Model, hidden: int, rngs: nnx.Rngs):
        pair = (model.width, hidden)
        self.up, self.down = (build_layout(model.layout, *widths, "model.layout") for widths in (pair, pair[::-1]))
        super().__init__(model, hidden, rngs)

    def make_weight(self, model, sizes, axes, fan_in, experts, rngs):
        blocks = self.up if axes[0] == "width" else self.down
        shape = (blocks.num_blocks, blocks.block, blocks.block)
        fan_in *= blocks.num_blocks * blocks.block**2 / (sizes["width"] * sizes["hidden"])
        return init_matrix(rngs, shape, ("blocks", "block_in", "block_out"), fan_in=fan_in, scale=model.init_scale)

    def multiply(self, x, name, weights, axes):
        return block_sparse_matmul(x, weights[name], self.down if name == "out" else self.up)
