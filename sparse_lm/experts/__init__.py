"""What is computed: each executor turns a choice and experts into outputs."""

from collections.abc import Callable

from sparse_lm.experts.einsum import einsum
from sparse_lm.experts.gather import gather

# executor(x [G, S, D], choice, compute, experts, capacity) -> (y [G, S, D], choices that got no place [])
# where compute maps [E, G, C, D] to [E, G, C, D].
EXECUTORS: dict[str, Callable] = {"einsum": einsum, "gather": gather}
