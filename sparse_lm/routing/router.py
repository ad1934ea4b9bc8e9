"""What every router does: the interface, and the scores that they share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.parameter import matrix
from sparse_lm.routing.choice import Routing


class Router(nnx.Module):
    """Chooses experts for tokens. Options are the keyword-only arguments of a router's `__init__`.

    A router may carry state that is not trained by gradient (expert biases, thresholds, tables). It is passed in, never
    kept in the module; `update` makes the next one once per optimizer step, from the statistics of the whole batch.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.kernel = matrix(
            rngs, (model.width, model.experts), ("width", "router_experts"), fan_in=model.width, scale=model.init_scale
        )

    def logits(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E"]:
        """Scores in float32 at the highest precision, whatever the rest computes in (selective precision, Fedus et al.
        2021, section 2.4). The cast alone is not enough: a TPU multiplies float32 in bfloat16 passes by default."""
        return jnp.einsum("gsd,de->gse", x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)

    def init_state(self) -> dict[str, jax.Array]:
        return {}

    def update(self, state: dict[str, jax.Array], statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return state

    def route(
        self,
        x: Float[Array, "G S D"],
        ids: Int[Array, "G S"],
        valid: Bool[Array, "G S"],
        state: dict[str, jax.Array],
        key: jax.Array | None = None,
        given: Int[Array, "G S K"] | None = None,
    ) -> Routing:
        """Routes G groups of S tokens.

        x: the tokens' features. ids: their token ids, for routers that look at the text. valid: False for padding,
        which gets no expert and enters no loss and no statistic. key: randomness while training, None in evaluation.
        given: experts to take instead of the router's own, as recorded before; weights come from x all the same.
        """
        raise NotImplementedError(type(self).__name__)
