"""The layers of a model in order, as the config describes them. Imports no jax.

The scan over layers, router state, names in checkpoints, counting, metrics by layer and replay all walk the stack.
"""

from dataclasses import dataclass

from sparse_lm.config import Choice, Model, choice


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is made of."""

    attention: Choice  # a name in models.table.ATTENTIONS
    feed_forward: Choice  # a name in models.table.FEED_FORWARDS
    hidden: int  # hidden width of the feed-forward layer, or F of each expert
    routed: bool = False  # whether it has a router


@dataclass(frozen=True)
class Stack:
    """A prefix of layers, then a period of layers, repeated."""

    prefix: tuple[LayerSpec, ...]
    period: tuple[LayerSpec, ...]
    repeats: int

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self.prefix + self.period * self.repeats

    @property
    def routed_layers(self) -> list[int]:
        """The numbers of the layers with a router, counted from 0."""
        return [number for number, spec in enumerate(self.layers) if spec.routed]

    def layer_numbers(self, part: str, place: int) -> list[int]:
        """Lists the layers at a place of a part: one layer for "prefix", one per repeat for "period"."""
        if part == "prefix":
            return [place]
        return [len(self.prefix) + repeat * len(self.period) + place for repeat in range(self.repeats)]


def decoder_stack(model: Model) -> Stack:
    """Builds the layers of a decoder: `dense_first` dense layers, then periods of `expert_every` layers. The last layer
    of each period has the feed-forward layer that `model.feed_forward` names: experts, blocks or dense."""
    kind = model.feed_forward
    if kind.name == "auto":
        kind = choice("experts" if model.experts else "dense" if model.layout.name == "dense" else "blocks")
    dense = LayerSpec(model.attention, choice("dense"), model.ffn_width)
    last = LayerSpec(model.attention, kind, model.expert_width, routed=model.experts > 0)
    return Stack(
        prefix=(dense,) * model.dense_first,
        period=(*(dense,) * (model.expert_every - 1), last),
        repeats=(model.layers - model.dense_first) // model.expert_every,
    )
