"""The feed-forward layer, dense or of experts: one computation, whatever multiplies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.kernels.block_sparse import block_sparse_matmul
from sparse_lm.kernels.linear import linear
from sparse_lm.layouts import Layout, layout
from sparse_lm.mesh import constrain
from sparse_lm.parameter import matrix, weight, weight_axes

DENSE = configs.choice("dense")
ACTIVATIONS = {"gelu": jax.nn.gelu, "geglu": jax.nn.gelu, "swiglu": jax.nn.silu}


class FeedForward(nnx.Module):
    """out(act(in(x))), or out(act(gate(x)) · in(x)) where gated (Shazeer 2020, arXiv 2002.05202), without biases.

    With `experts`, each weight has a leading axis of E experts, and it is an executor that applies them. With a layout,
    each weight is the blocks of a matrix that exist, [n, b, b] (Gray et al. 2017).
    """

    def __init__(
        self,
        model: configs.Model,
        width: int,
        rngs: nnx.Rngs,
        *,
        experts: int = 0,
        dropout: float = 0.0,
        blocks: configs.Choice = DENSE,
    ):
        self.up, self.down = (
            None if blocks.name == "dense" else layout(blocks, *widths, "model.layout")
            for widths in ((model.width, width), (width, model.width))
        )

        def make(fan_in: int, axes: tuple[str, str], of_blocks: Layout | None) -> nnx.Param:
            sizes = {"width": model.width, "hidden": width}
            shape = tuple(sizes[axis] for axis in axes)
            if of_blocks is not None:
                shape, axes = (of_blocks.count, of_blocks.block, of_blocks.block), ("blocks", "block_in", "block_out")
                fan_in *= of_blocks.count * of_blocks.block**2 / (model.width * width)
            elif experts:
                shape, axes = (experts, *shape), ("experts", *axes)
            return matrix(rngs, shape, axes, fan_in=fan_in, scale=model.init_scale)

        make_up = lambda: make(model.width, ("width", "hidden"), self.up)
        self.into = make_up()
        self.out = make(width, ("hidden", "width"), self.down)
        self.gate = make_up() if model.gated else None
        self.activation = model.activation
        self.dropout = dropout

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The layer without experts."""
        weights, axes = self.weights(x.dtype)

        def product(x, name):
            blocks = self.down if name == "out" else self.up
            if blocks is not None:
                return block_sparse_matmul(x, weights[name], blocks)
            return constrain(linear(x, weights[name]), "batch", None, axes[name][-1])

        return self.layer(x, product)

    def weights(self, dtype: str | jnp.dtype) -> tuple[dict[str, jax.Array], dict[str, tuple[str | None, ...]]]:
        """The weights by name as a product takes them, whole along the model's width, and the names of their axes."""
        named = {"into": self.into, "out": self.out} | ({} if self.gate is None else {"gate": self.gate})
        return {n: weight(p, dtype) for n, p in named.items()}, {n: weight_axes(p) for n, p in named.items()}

    def layer(self, x: Float[Array, "*N D"], product: Callable, key: jax.Array | None = None) -> Float[Array, "*N D"]:
        """The layer with product(x, name) for the product of x and the weights of a name; a key turns on dropout of the
        hidden units."""
        hidden = product(x, "into")
        activate = ACTIVATIONS[self.activation]
        hidden = activate(hidden) if self.gate is None else activate(product(x, "gate")) * hidden
        return product(dropout(hidden, self.dropout, key), "out")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of x and scales the rest; without a key, x itself."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
