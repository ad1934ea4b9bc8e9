"""A feed-forward layer whose matrices are products of two thin ones."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.kernels.linear import linear
from sparse_lm.mesh import constrain
from sparse_lm.models.context import Context
from sparse_lm.models.counting import Part, Setting, elementwise, product
from sparse_lm.parameter import gather_weight, init_matrix


class LowRank(nnx.Module):
    """out(gelu(in(x))), where in and out have at most `rank`."""

    router = None

    def __init__(self, model: configs.Model, hidden: int, rngs: nnx.Rngs, *, rank: int = 4):
        d, scale = model.width, model.init_scale
        self.into_thin = init_matrix(rngs, (d, rank), ("width", None), fan_in=d, scale=scale)
        self.into = init_matrix(rngs, (rank, hidden), (None, "hidden"), fan_in=rank, scale=scale)
        self.out_thin = init_matrix(rngs, (hidden, rank), ("hidden", None), fan_in=hidden, scale=scale)
        self.out = init_matrix(rngs, (rank, d), (None, "width"), fan_in=rank, scale=scale)
        self.hidden = hidden

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context | None = None,
        state: Any = None,
        key: jax.Array | None = None,
        replay: Any = None,
    ) -> tuple[Float[Array, "B L D"], None]:
        multiply = lambda x, parameter: linear(x, gather_weight(parameter, x.dtype))
        with jax.named_scope("feed_forward"):
            hidden = multiply(multiply(x, self.into_thin), self.into)
            hidden = jax.nn.gelu(constrain(hidden, "batch", None, "hidden"))
            return multiply(multiply(hidden, self.out_thin), self.out), None

    def flops(self, setting: Setting) -> Iterator[Part]:
        for parameter in (self.into_thin, self.into, self.out_thin, self.out):
            again = setting.products_again and not (setting.last and parameter is self.out)
            yield product("feed-forward", 2 * math.prod(parameter.shape), again=again)
        yield from elementwise([(self.hidden, (8, 32))], setting)
