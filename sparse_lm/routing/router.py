"""What every router does: the interface, and what learned routers share."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.parameter import init_matrix
from sparse_lm.routing.choice import Choice, Routing, TokenChoice


class Router(nnx.Module):
    """Chooses experts for tokens. Options are the keyword-only arguments of a router's `__init__`.

    A router may carry state that is not trained by gradient (expert biases, thresholds, tables). It is passed in, never
    kept in the module; `update` makes the next one once per optimizer step, from the statistics of the whole batch.

    form: the form of its choices. k_experts: every token gets top_k experts, in a group whose tokens are all valid and
    before capacity. skips_layers: tokens are chosen for a whole layer, not for the experts in it. looks_ahead: how
    `route` makes a token's choice depend on later tokens of the text, in a few words; "": it does not.
    alone_in_evaluation: it does so with a key only. in_generation: what `route_alone` does instead.
    """

    form: ClassVar[type[Choice]] = TokenChoice
    k_experts: ClassVar[bool] = True
    looks_ahead: ClassVar[str] = ""
    alone_in_evaluation: ClassVar[bool] = False
    in_generation: ClassVar[str] = ""
    skips_layers: ClassVar[bool] = False

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.experts, self.top_k, self.over = model.experts, model.top_k, model.balance_over

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
        replay: jax.Array | None = None,
    ) -> Routing:
        """Routes G groups of S tokens.

        x: the tokens' features. ids: their token ids, for routers that look at the text. valid: False for padding,
        which gets no expert and enters no loss and no statistic. key: randomness while training, None in evaluation.
        replay: what `choice.chosen_indices` recorded before, to take instead of the router's own; weights come from
        x all the same.
        """
        raise NotImplementedError(type(self).__name__)

    def route_alone(
        self, x: Float[Array, "G S D"], ids: Int[Array, "G S"], valid: Bool[Array, "G S"], state: dict[str, jax.Array]
    ) -> Routing:
        """Routes each token by itself, as generation has to. A router that looks ahead says what it does instead."""
        return self.route(x, ids, valid, state)


class LearnedRouter(Router):
    """A router whose scores are a product of the tokens' features with a matrix."""

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.kernel = kernel(model, rngs)

    def logits(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E"]:
        return scores(x, self.kernel)


def kernel(model: configs.Model, rngs: nnx.Rngs) -> nnx.Param:
    """A matrix from the features to a score for each expert."""
    axes = ("width", "router_experts")
    return init_matrix(rngs, (model.width, model.experts), axes, fan_in=model.width, scale=model.init_scale)


def scores(x: Float[Array, "G S D"], kernel: nnx.Param) -> Float[Array, "G S E"]:
    """Scores in float32 at the highest precision, whatever the rest computes in (selective precision, Fedus et al.
    2021, section 2.4). The cast alone is not enough: a TPU multiplies float32 in bfloat16 passes by default."""
    return jnp.einsum("gsd,de->gse", x.astype(jnp.float32), kernel[...], precision=jax.lax.Precision.HIGHEST)


def jittered(x: Float[Array, "G S D"], jitter: float, key: jax.Array | None) -> Float[Array, "G S D"]:
    """x in float32 times noise uniform in [1 - jitter, 1 + jitter]; without a key or jitter, x itself."""
    if key is None or not jitter:
        return x
    return x.astype(jnp.float32) * jax.random.uniform(key, x.shape, minval=1 - jitter, maxval=1 + jitter)


def sum_to_1(model: configs.Model, normalize: bool) -> bool:
    """Whether a router that is to `normalize` divides the weights of a token's experts by their sum. For one expert of
    several it does not, as DeepSeek-V3's code has it: the weight would be 1 whatever is learned."""
    return normalize and (model.top_k > 1 or model.experts == 1)


def check_several(model: configs.Model) -> None:
    """Raises `UserError` for one expert per token of several, where the weights of a router always sum to 1."""
    if model.top_k == 1 and model.experts > 1:
        raise UserError(
            f"model.top_k is 1, for which the weights of the router {model.router.name!r} are 1 whatever it learns; it "
            "must be above 1"
        )


def choose_top(scores: Float[Array, "G S E"], k: int, replay: Int[Array, "G S K"] | None) -> Int[Array, "G S K"]:
    """The k experts of the largest scores, the largest first and of equal ones the first; or the experts given."""
    return largest_k(scores, k)[1] if replay is None else replay


def largest_k(scores: Float[Array, "*N E"], k: int) -> tuple[Float[Array, "*N K"], Int[Array, "*N K"]]:
    """The k largest scores, and where they are. With slices of them fused in, XLA would sort all E on a CPU; with one
    barrier around both, it aborts where the tensor axis alone divides a step."""
    values, indices = jax.lax.top_k(scores, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)


def gather_chosen(values: Float[Array, "G S E"], expert: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """The values of the chosen experts."""
    return jnp.take_along_axis(values, jnp.maximum(expert, 0), axis=-1)


def token_choice(
    expert: Int[Array, "G S K"],
    weight: Float[Array, "G S K"],
    valid: Bool[Array, "G S"],
    priority: Float[Array, "G S"] | None = None,
) -> TokenChoice:
    """The choice with nobody chosen for padding, and no weight where nobody is chosen."""
    expert = jnp.where(valid[..., None], expert, -1)
    return TokenChoice(expert, jnp.where(expert >= 0, weight, 0), priority)
