"""How layers count their own floating-point operations; `cost.flops` adds them up.

A multiply-add counts 2. *Model* FLOPs are those of the mathematics, *executed* ones those of the compiled program,
which also pads, masks, computes again what rematerialisation left out, and works on single elements: norms, softmax,
activations. The mathematics calls work per element nothing beside the products, and at the width of a real model it is.
In a model small enough for a laptop it is some percent, which a count that is to agree with the compiler's can't leave
out. Its coefficients stand beside the layers as (forward, backward) FLOPs per element, as XLA counts the compiled
program (what it fuses it may compute twice; exponentials are not FLOPs to it), measured by changing one size at a time,
and rounded.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Count = int | float  # of FLOPs, or of elements; a share of the tokens makes fractions


@dataclass(frozen=True)
class Part:
    """FLOPs per token of one part of one layer (None: outside the layers)."""

    name: str
    model: Count  # forward
    forward: Count  # executed
    backward: Count  # executed, without what is computed again
    again: Count = 0  # of the forward pass, in the backward pass
    layer: int | None = None

    @property
    def model_training(self) -> Count:
        return 3 * self.model

    @property
    def training(self) -> Count:
        """Executed."""
        return self.forward + self.backward + self.again

    def times(self, share: Count) -> "Part":
        """The same for a share of the tokens."""
        counts = {name: share * getattr(self, name) for name in ("model", "forward", "backward", "again")}
        return dataclasses.replace(self, **counts)


class Setting(NamedTuple):
    """What a layer's FLOPs depend on beside the layer itself."""

    length: Count  # L, tokens of a row
    platform: str = "cpu"  # cpu, gpu or tpu, where executor `auto` has its choice
    remat: str = "none"  # `model.remat`
    last: bool = False  # whether it ends what is computed again together, so that its last product is not

    @property
    def products_again(self) -> bool:
        """Whether products with dense weights are computed again in the backward pass."""
        return self.remat == "full"

    @property
    def rest_again(self) -> bool:
        """Whether everything else is."""
        return self.remat in ("dots", "full")


def product(name: str, needed: Count, executed: Count = 1, again: Count = 0) -> Part:
    """A matrix product of the mathematics, how many times as much of it the program runs, and the share run again."""
    run = executed * needed
    return Part(name, needed, run, 2 * run, again * run)


def elementwise(counts: Iterable[tuple[Count, tuple[int, int]]], setting: Setting) -> Iterator[Part]:
    """Work per element: numbers of elements with their (forward, backward) FLOPs."""
    for number, (forward, backward) in counts:
        yield Part("elementwise", 0.0, number * forward, number * backward, number * forward * setting.rest_again)
