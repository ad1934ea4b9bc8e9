"""The fastest executor for the platform, the form of the choice and the capacity at hand: `model.executor = "auto"`.

`python -m experiments.benchmarks.dense_twin` shows on a machine whether the rule of `choose_executor` still holds.
"""

from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm import mesh
from sparse_lm.experts.einsum import einsum
from sparse_lm.experts.executor import Executor, Experts
from sparse_lm.experts.gather import gather
from sparse_lm.experts.grouped import grouped
from sparse_lm.routing import Choice, ExpertChoice, SoftSlots, TokenChoice


def run_fastest(
    x: Float[Array, "G S D"], choice: Choice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts by the executor that `choose_executor` names; see `Executor.run`."""
    num_experts, _, expert_width = experts.weights["into"].shape
    name = choose_executor(
        mesh.platform(),
        type(choice),
        group_size=x.shape[1],
        num_experts=num_experts,
        top_k=experts.passed,
        capacity=capacity,
        expert_width=expert_width,
    )
    return {"einsum": einsum, "gather": gather, "grouped": grouped}[name].run(x, choice, experts, capacity)


def choose_executor(
    platform: str,
    form: type[Choice],
    *,
    group_size: int,
    num_experts: int,
    top_k: int,
    capacity: int,
    expert_width: int,
) -> str:
    """Chooses the fastest executor of an expert layer, from shapes alone.

    Slots are mixtures, which masks alone express, and experts that choose tokens fill every place. Where tokens choose:
    on a CPU sorted rows are the fastest throughout (docs/lab_notebook.md). A TPU multiplies by masks at next to nothing
    as long as they cost less than a tenth of the experts, group_size / expert_width; on it and on a GPU indices are
    best where at least half of the places are filled, and sorted rows where a capacity would leave more of them empty.
    Neither has been timed yet.

    Args:
        platform: cpu, gpu or tpu.
        form: of the router's choice.
        group_size: S, the tokens that are routed together.
        num_experts: E.
        top_k: K, the experts that a token passes through.
        capacity: C, the places of each expert in each group.
        expert_width: F, the hidden units of an expert.

    Returns:
        A name in `EXECUTORS`, never "auto".
    """
    if form is SoftSlots:
        return "einsum"
    if form is ExpertChoice:
        return "gather"
    if platform == "cpu":
        return "grouped"
    half_filled = num_experts * capacity <= 2 * top_k * group_size
    if platform == "tpu" and half_filled and group_size <= expert_width / 10:
        return "einsum"
    return "gather" if half_filled else "grouped"


def executor_name(model: configs.Model, form: type[Choice], platform: str, capacity_factor: float | None = None) -> str:
    """Names the executor that computes a model's experts.

    Args:
        model: whose `executor` is returned, unless it is "auto".
        form: of its router's choice, for "auto".
        platform: cpu, gpu or tpu, for "auto".
        capacity_factor: for "auto"; None: that of training.

    Returns:
        A name in `EXECUTORS`, never "auto".
    """
    if model.executor != "auto":
        return model.executor
    factor = model.capacity_factor if capacity_factor is None else capacity_factor
    return choose_executor(
        platform,
        form,
        group_size=model.group_size,
        num_experts=model.experts,
        top_k=model.top_k,
        capacity=configs.compute_capacity(model.group_size, model.experts, model.top_k, factor),
        expert_width=model.expert_width,
    )


auto = Executor(run_fastest, (TokenChoice, ExpertChoice, SoftSlots))
