"""The dense twin of a sparse model: the dense model of equal FLOPs that it is compared with."""

import dataclasses

from sparse_lm.config import Config, Model, choice, resolve
from sparse_lm.cost.flops import count_flops
from sparse_lm.errors import UserError
from sparse_lm.models.counting import Setting
from sparse_lm.models.functional import abstract_layer
from sparse_lm.routing import router_of
from sparse_lm.stack import LayerSpec, decoder_stack


def dense_twin(config: Config) -> Config:
    """Replaces each sparse layer of a config by a dense feed-forward layer of equal model FLOPs per token.

    A token passes K experts of width F, and shared experts, so the dense layer has their total width; data, optimizer,
    seed and initialisation stay. Model FLOPs then differ by the router's, and by rounding where experts choose tokens
    or work on mixtures. Dense matrices have as many entries as block-sparse ones. Layers that tokens skip are removed,
    and the remaining layers are wider.

    Returns:
        The twin's config, resolved.

    Raises:
        UserError: for a dense config.
    """
    config = resolve(config)
    model = config.model
    if not model.sparse:
        raise UserError(
            "model.experts is 0: the config is dense and has no dense twin; set model.experts above 0, or model.layout"
        )
    if model.experts and router_of(model).skips_layers:
        dense = _remove_skipped_layers(model, config.data.length)
    else:
        sparse = decoder_stack(model).period[-1]
        dense_unit = dataclasses.replace(sparse, feed_forward=choice("dense"), hidden=1)
        needed, per_unit = (_feed_forward_flops(model, spec, config.data.length) for spec in (sparse, dense_unit))
        width = max(1, round(needed / per_unit))
        dense = dataclasses.replace(_replace_experts(model), expert_width=width)
    return resolve(dataclasses.replace(config, model=dense, name=f"{config.name}-dense"))


def _replace_experts(model: Model) -> Model:
    kinds = {"feed_forward": choice("auto"), "layout": choice("dense")}
    return dataclasses.replace(model, experts=0, top_k=1, shared_experts=0, **kinds)


def _feed_forward_flops(model: Model, spec: LayerSpec, length: int) -> float:
    """Counts the model FLOPs per token of a layer's feed-forward part, without the router."""
    parts = abstract_layer(model, spec).feed_forward.flops(Setting(length))
    return sum(part.model for part in parts if part.name != "router")


def _remove_skipped_layers(model: Model, length: int) -> Model:
    """Keeps the layers that every token passes, with feed-forward parts wide enough to make up for the other layers."""
    layers = sum(not spec.routed for spec in decoder_stack(model).layers)
    if not layers:
        raise UserError("model.expert_every is 1, so that tokens skip every layer; a dense twin needs 2 or more")
    dense = dataclasses.replace(_replace_experts(model), layers=layers, dense_first=0, expert_every=1)
    flops_of_width = lambda width: count_flops(dataclasses.replace(dense, expert_width=width), length).training
    sparse, one, two = count_flops(model, length), flops_of_width(1), flops_of_width(2)
    width = round(1 + (sparse.training - sparse.router - one) / (two - one))  # FLOPs are linear in the width
    return dataclasses.replace(dense, expert_width=width)
