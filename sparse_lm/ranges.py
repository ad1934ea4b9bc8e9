"""The values that a field of a config or an option may have, said in the type where it is declared:

    dropout: Annotated[float, Range(least=0, below=1)] = 0.0

A number without a range must be finite. Imports no jax.
"""

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from sparse_lm.errors import suggest


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, each in the range (`least`, `most`) or just outside it (`above`, `below`)."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            not math.isnan(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = [f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None and math.isfinite(bound)]
        return " and ".join(said + ["finite"] * (math.inf in (self.below, self.most)))


class OneOf:
    """One of some names."""

    def __init__(self, *names: str):
        self.names = names


FINITE = Range(above=-math.inf, below=math.inf)

Size = Annotated[int, Range(least=1, most=2**24)]
SizeOr0 = Annotated[int, Range(least=0, most=2**24)]
Steps = Annotated[int, Range(least=1, most=2**31 - 1)]
StepsOr0 = Annotated[int, Range(least=0, most=2**31 - 1)]
Devices = Annotated[int, Range(least=-1, most=2**20)]
Seed = Annotated[int, Range(least=0, most=2**31 - 1)]
Positive = Annotated[float, Range(above=0, below=math.inf)]
Factor = Annotated[float, Range(above=0)]  # inf too
NotNegative = Annotated[float, Range(least=0, below=math.inf)]
Share = Annotated[float, Range(least=0, most=1)]
Probability = Annotated[float, Range(least=0, below=1)]  # a rate of dropout, a decay: 1 would leave nothing


def strip_range(kind: Any) -> Any:
    """A type without its range."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def explain_fault(kind: Any, value: Any) -> str:
    """What a value of the right type must be instead, such as "; it must be above 0"; empty where it is in range."""
    limits = [limit for limit in getattr(kind, "__metadata__", ()) if isinstance(limit, Range | OneOf)]
    if not limits and isinstance(value, float):
        limits = [FINITE]
    for limit in limits:
        if isinstance(limit, OneOf) and value not in limit.names:
            return suggest(value, limit.names)
        if isinstance(limit, Range) and value not in limit:
            return f"; it must be {limit}"
    return ""
