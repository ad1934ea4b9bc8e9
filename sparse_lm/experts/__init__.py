"""What is computed: each executor turns a choice and experts into outputs."""

from sparse_lm.experts.auto import auto
from sparse_lm.experts.einsum import einsum
from sparse_lm.experts.executor import Executor as Executor
from sparse_lm.experts.executor import Experts as Experts
from sparse_lm.experts.expert import apply_expert as apply_expert
from sparse_lm.experts.expert import dropout as dropout
from sparse_lm.experts.gather import gather
from sparse_lm.experts.grouped import grouped

EXECUTORS: dict[str, Executor] = {"auto": auto, "einsum": einsum, "gather": gather, "grouped": grouped}
