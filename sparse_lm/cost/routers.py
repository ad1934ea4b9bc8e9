"""What routers add to a model: their parameters, and how many experts a token passes. By the router's name alone."""

import dataclasses

from sparse_lm.config import Model, capacity
from sparse_lm.cost.automatic import automatic

# The form of a router's choice where it is not that tokens choose experts, as `form` of the classes in `routing`.
FORMS = {"expert_choice": "expert", "mixture_of_depths": "expert", "soft": "slots"}


def form(model: Model) -> str:
    """token, expert or slots."""
    return FORMS.get(model.router.name, "token")


def skips_layers(model: Model) -> bool:
    """Whether the router chooses tokens for whole layers, which the others skip."""
    return model.experts > 0 and model.router.name == "mixture_of_depths"


def router_arrays(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of a router's parameters by name. Matrices are multiplied with the features of every token."""
    kernel, options = (model.width, model.experts), model.router.options
    match model.router.name:
        case "random":
            return {}
        case "hash":
            return {"kernel": kernel} if options.get("gate", False) else {}
        case "noisy_topk":
            return {"kernel": kernel, "noise": kernel}
        case "soft":
            phi = {"phi": (*kernel, places_per_expert(model))}
            return phi | ({"scale": (1,)} if options.get("normalize", True) else {})
    return {"kernel": kernel}


def places_per_expert(model: Model) -> int:
    """C, in training."""
    return capacity(model.group_size, model.experts, model.top_k, model.capacity_factor)


def experts_per_token(model: Model) -> float:
    """How many experts' work the mathematics needs for a token: K where tokens choose, otherwise E C / S."""
    if form(model) == "token":
        return model.top_k
    return model.experts * places_per_expert(model) / model.group_size


def executor(model: Model, platform: str, capacity_factor: float | None = None) -> str:
    """The name of the model's executor; of `auto`, what it takes on a platform, in training unless told otherwise."""
    if model.executor != "auto":
        return model.executor
    factor = model.capacity_factor if capacity_factor is None else capacity_factor
    return automatic(
        platform,
        form(model),
        size=model.group_size,
        experts=model.experts,
        top_k=model.top_k,
        capacity=capacity(model.group_size, model.experts, model.top_k, factor),
        width=model.expert_width,
    )


def settled(model: Model, platform: str) -> Model:
    """The model with the name of what `auto` takes on a platform."""
    return dataclasses.replace(model, executor=executor(model, platform)) if model.experts else model


def rows(model: Model) -> int:
    """Rows that the experts of a `settled` model compute for a group of S tokens: every place, or where rows are sorted
    every choice."""
    if model.executor == "grouped":
        return model.top_k * model.group_size
    return model.experts * places_per_expert(model)
