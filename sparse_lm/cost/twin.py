"""The dense twin: the model that a sparse model has to beat."""

import dataclasses

from sparse_lm.config import Config, Model, choice, resolve
from sparse_lm.cost.flops import count_flops
from sparse_lm.errors import UserError
from sparse_lm.models.counting import Setting
from sparse_lm.models.expert_layer import router_of
from sparse_lm.models.functional import abstract_layer
from sparse_lm.stack import LayerSpec, decoder_stack


def dense_twin(config: Config) -> Config:
    """The same config with a dense feed-forward layer of equal FLOPs per token in each sparse layer's place, resolved.

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
    if model.experts and router_of(model).skips_layers:
        dense = _without_skipped_layers(model, config.data.length)
    else:
        sparse = decoder_stack(model).period[-1]
        of_width = lambda width: dataclasses.replace(sparse, feed_forward=choice("dense"), hidden=width)
        width = round(_feed_forward_flops(model, sparse) / _feed_forward_flops(model, of_width(1)))
        dense = dataclasses.replace(_replace_experts(model), expert_width=width)
    return resolve(dataclasses.replace(config, model=dense, name=f"{config.name}-dense"))


def _replace_experts(model: Model) -> Model:
    kinds = {"feed_forward": choice("auto"), "layout": choice("dense")}
    return dataclasses.replace(model, experts=0, top_k=1, shared_experts=0, **kinds)


def _feed_forward_flops(model: Model, spec: LayerSpec) -> float:
    """Model FLOPs per token of a layer's feed-forward part, without the router's."""
    parts = abstract_layer(model, spec).feed_forward.flops(Setting(length=1))
    return sum(part.model for part in parts if part.name != "router")


def _without_skipped_layers(model: Model, length: int) -> Model:
    """The layers that every token passes, with feed-forward parts so wide that they cost what the others did too."""
    layers = sum(not spec.routed for spec in decoder_stack(model).layers)
    if not layers:
        raise UserError("model.expert_every is 1, so that tokens skip every layer; a dense twin needs 2 or more")
    passed = dataclasses.replace(_replace_experts(model), layers=layers, dense_first=0, expert_every=1)
    of_width = lambda width: count_flops(dataclasses.replace(passed, expert_width=width), length).training
    sparse = count_flops(model, length)
    # Linear in the width.
    width = round(1 + (sparse.training - sparse.router - of_width(1)) / (of_width(2) - of_width(1)))
    return dataclasses.replace(passed, expert_width=width)
