"""The fastest executor for the platform, the form of the choice and the capacity at hand."""

from jaxtyping import Array, Float

from sparse_lm.cost.automatic import automatic
from sparse_lm.experts.einsum import einsum
from sparse_lm.experts.executor import Executor, Experts
from sparse_lm.experts.gather import gather
from sparse_lm.experts.grouped import grouped
from sparse_lm.mesh import platform
from sparse_lm.routing import Choice, ExpertChoice, SoftSlots, TokenChoice

FORMS = {TokenChoice: "token", ExpertChoice: "expert", SoftSlots: "slots"}


def run(
    x: Float[Array, "G S D"], choice: Choice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """What `cost.automatic` names does it."""
    count, _, width = experts.weights["into"].shape
    name = automatic(
        platform(),
        FORMS[type(choice)],
        size=x.shape[1],
        experts=count,
        top_k=experts.passed,
        capacity=capacity,
        width=width,
    )
    return {"einsum": einsum, "gather": gather, "grouped": grouped}[name].run(x, choice, experts, capacity)


auto = Executor(run, (TokenChoice, ExpertChoice, SoftSlots))
