"""One description of a model: which layers stand where. Made from a config in one place; imports no jax.

The scan over layers, router state, names in checkpoints, counting, metrics by layer and replay all walk the stack.
"""

from dataclasses import dataclass

from sparse_lm.config import Choice, Model, choice


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is made of."""

    attention: Choice  # of models.table.ATTENTIONS
    feed_forward: Choice  # of models.table.FEED_FORWARDS
    hidden: int  # F, hidden width of the feed-forward part, of one expert where it has several
    routed: bool = False  # whether a router decides what its tokens pass


@dataclass(frozen=True)
class Stack:
    """Layers one after the other: a prefix, then a period that is repeated."""

    prefix: tuple[LayerSpec, ...]
    period: tuple[LayerSpec, ...]
    repeats: int

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self.prefix + self.period * self.repeats

    @property
    def routed(self) -> list[int]:
        """The numbers (0, 1, …) of the routed layers."""
        return [number for number, spec in enumerate(self.layers) if spec.routed]

    def numbers(self, part: str, place: int) -> list[int]:
        """The numbers of the layers at a place of a part: of one in `prefix`, of one for each repeat in `period`."""
        if part == "prefix":
            return [place]
        return [len(self.prefix) + repeat * len(self.period) + place for repeat in range(self.repeats)]


def decoder_stack(model: Model) -> Stack:
    """The layers of a decoder: `dense_first` dense ones, then periods of `expert_every`, the last of which is the one
    that `model.feed_forward` names: experts, blocks, or a dense layer in their place."""
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
