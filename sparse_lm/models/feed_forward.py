"""The dense feed-forward layer, and the weights of one made of experts: out(act(in(x)))."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.experts import apply_expert
from sparse_lm.experts.expert import GATED
from sparse_lm.kernels.linear import linear
from sparse_lm.mesh import constrain
from sparse_lm.models.context import Context
from sparse_lm.models.counting import Part, Setting, elementwise, product
from sparse_lm.parameter import gather_weight, gathered_axes, init_matrix

# (forward, backward) FLOPs per hidden unit, see `models.counting`.
HIDDEN = {"gelu": (8, 32), "geglu": (9, 37), "swiglu": (5, 17)}


class FeedForward(nnx.Module):
    """out(act(in(x))), or out(act(gate(x)) · in(x)) where gated (Shazeer 2020, arXiv 2002.05202), without biases.

    With `experts`, each weight has a leading axis of E experts, and it is an executor that applies them.

    A kind of feed-forward layer is such a class and an entry in `models.table`: called with what `Layer` gives it, it
    returns its output and, where it is routed, an `Aux`; and it counts its FLOPs. Options are the keyword-only
    arguments of its `__init__`.
    """

    router = None  # of a routed kind, its `routing.Router`

    def __init__(self, model: configs.Model, hidden: int, rngs: nnx.Rngs, experts: int = 0):
        def make(fan_in: int, *axes: str) -> nnx.Param:
            return self.make_weight(model, {"width": model.width, "hidden": hidden}, axes, fan_in, experts, rngs)

        self.into = make(model.width, "width", "hidden")
        self.out = make(hidden, "hidden", "width")
        self.gate = make(model.width, "width", "hidden") if model.activation in GATED else None
        self.activation, self.hidden = model.activation, hidden

    def make_weight(self, model, sizes, axes, fan_in, experts, rngs) -> nnx.Param:
        """One weight from the first axis to the second."""
        lead = (experts,) if experts else ()
        shape = (*lead, *(sizes[axis] for axis in axes))
        return init_matrix(rngs, shape, ("experts", *axes)[-len(shape) :], fan_in=fan_in, scale=model.init_scale)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context | None = None,
        state: Any = None,
        key: jax.Array | None = None,
        replay: Any = None,
    ) -> tuple[Float[Array, "B L D"], None]:
        """The layer without experts; only x matters to it."""
        weights, axes = self.weights(x.dtype)
        with jax.named_scope("feed_forward"):
            return apply_expert(x, lambda x, name: self.multiply(x, name, weights, axes), self.activation), None

    def multiply(self, x, name: str, weights: dict[str, Array], axes: dict[str, tuple]) -> Float[Array, "B L _"]:
        return constrain(linear(x, weights[name]), "batch", None, axes[name][-1])

    @property
    def _named(self) -> dict[str, nnx.Param]:
        return {"into": self.into, "out": self.out} | ({} if self.gate is None else {"gate": self.gate})

    def weights(self, dtype: str | jnp.dtype) -> tuple[dict[str, jax.Array], dict[str, tuple[str | None, ...]]]:
        """The weights by name as a product takes them, whole along the model's width, and the names of their axes."""
        named = self._named
        return {n: gather_weight(p, dtype) for n, p in named.items()}, {n: gathered_axes(p) for n, p in named.items()}

    @property
    def product_flops(self) -> int:
        """Of a token that passes it, or one of its experts, or the blocks that exist."""
        of_one = lambda p: math.prod(p.shape[1:] if p.get_metadata("axes")[0] == "experts" else p.shape)
        return sum(2 * of_one(parameter) for parameter in self._named.values())

    def flops(self, setting: Setting, name: str = "feed-forward") -> Iterator[Part]:
        """Per token."""
        products = len(self._named)
        again = setting.products_again * (products - setting.last) / products
        yield product(name, self.product_flops, again=again)
        yield from elementwise([(self.hidden, HIDDEN[self.activation])], setting)
