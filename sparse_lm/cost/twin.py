"""The dense twin: the model that a sparse model has to beat."""

import dataclasses
import math

from sparse_lm.config import Config, Model, choice, resolve
from sparse_lm.cost.arrays import of_blocks
from sparse_lm.cost.flops import flops
from sparse_lm.cost.routers import experts_per_token, form, rows, skips_layers
from sparse_lm.errors import UserError


def twin(config: Config) -> Config:
    """The same config with a dense feed-forward layer of equal FLOPs per token in each expert layer's place, resolved.

    A token passes K experts of width F, and shared ones, so the dense layer has the width of all of them; everything
    else (data, optimizer, seed, initialisation) stays. The twins' model FLOPs differ by the router's alone, but for
    rounding where experts choose tokens or work on mixtures. Where matrices are made of blocks, the dense ones have as
    many numbers. Of layers that tokens skip the twin has none; those that are left are wider.

    Raises `UserError` for a dense config.
    """
    config = resolve(config)
    model = config.model
    if not model.sparse:
        raise UserError(
            "model.experts is 0: the config is dense and has no dense twin; set model.experts above 0, or model.layout"
        )
    if blocks := of_blocks(model, model.layers - 1):
        width = round(math.prod(blocks[0]) / model.width)
        dense = dataclasses.replace(model, layout=choice("dense"), expert_width=width)
    elif skips_layers(model):
        dense = _without_skipped_layers(model, config.data.length)
    else:
        width = (experts_per_token(model) + model.shared_experts) * model.expert_width
        if form(model) == "slots":  # into each slot and out of it
            width += 2 * rows(model) / (3 if model.gated else 2)
        dense = dataclasses.replace(model, experts=0, top_k=1, shared_experts=0, expert_width=round(width))
    return resolve(dataclasses.replace(config, model=dense, name=f"{config.name}-dense"))


def _without_skipped_layers(model: Model, length: int) -> Model:
    """The layers that every token passes, with feed-forward parts so wide that they cost what the others did too."""
    layers = model.dense_first + model.periods * (model.expert_every - 1)
    if not layers:
        raise UserError("model.expert_every is 1, so that tokens skip every layer; a dense twin needs 2 or more")
    passed = dataclasses.replace(model, experts=0, layers=layers, dense_first=0, expert_every=1)
    of_width = lambda width: flops(dataclasses.replace(passed, expert_width=width), length).training
    sparse = flops(model, length)
    width = round((sparse.training - sparse.router - of_width(0)) / (of_width(1) - of_width(0)))
    return dataclasses.replace(passed, expert_width=width)
