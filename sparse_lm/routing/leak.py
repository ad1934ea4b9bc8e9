"""Whether outputs can depend on later tokens through the routing, which makes a language model's loss too low."""

import math

from sparse_lm.config import Model, compute_capacity
from sparse_lm.routing.choice import TokenChoice
from sparse_lm.routing.table import router_of


def leak(model: Model, capacity_factor: float, training: bool = False) -> str:
    """How an evaluation, or training, at this capacity factor looks ahead, in a few words; "" where it does not.

    A router may look ahead, and so may the placement under a capacity. Generation routes each token by itself, with a
    place for everyone, and never does.
    """
    if not model.experts:
        return ""
    router = router_of(model)
    if router.looks_ahead and (training or not router.alone_in_evaluation):
        return router.looks_ahead
    if training and not math.isinf(model.exchange_buffer) and model.executor in ("auto", "grouped"):
        return "over several devices, rows that one has no room for are dropped, whatever came first"
    drops = compute_capacity(model.group_size, model.experts, model.top_k, capacity_factor) < model.group_size
    only_first = router.k_experts and model.top_k == 1 and not model.router.options.get("priority", False)
    if router.form is TokenChoice and drops and not only_first:
        return f"at a capacity factor of {capacity_factor:g}, tokens lose their places to later ones"
    return ""
