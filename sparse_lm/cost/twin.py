"""The dense twin: the model that a sparse model has to beat."""

import dataclasses

from sparse_lm.config import Config, resolve
from sparse_lm.errors import UserError


def twin(config: Config) -> Config:
    """The same config with a dense feed-forward layer of equal FLOPs per token in each expert layer's place, resolved.

    A token passes K experts of width F, so the dense layer has width K·F; everything else (data, optimizer, seed,
    initialisation) stays. The twins' model FLOPs differ by the router's alone. Raises `UserError` for a dense config.
    """
    config = resolve(config)
    model = config.model
    if not model.experts:
        raise UserError("model.experts is 0: the config is dense and has no dense twin; set model.experts above 0")
    dense = dataclasses.replace(model, experts=0, top_k=1, expert_width=model.top_k * model.expert_width)
    return resolve(dataclasses.replace(config, model=dense, name=f"{config.name}-dense"))
