"""Which blocks of a block-sparse weight matrix exist (Gray, Radford and Kingma 2017, "GPU kernels for block-sparse
weights"). Pure NumPy: a layout is known when a program is built, and parameters and FLOPs are counted from it.

Every pattern keeps exactly round(density · rows · columns) blocks, gives each column as many as the next but for one,
because equal counts make the product fast, and leaves no row or column without a block.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool

from sparse_lm.config import Choice
from sparse_lm.errors import UserError, nearest_divisor
from sparse_lm.ranges import Range, Share, Size
from sparse_lm.registry import create


@dataclass(frozen=True)
class Layout:
    """The blocks that exist of a matrix of rows × columns blocks, in row-major order, the order of the parameter.

    Hashable, so that it can be a static argument: the matrix maps width_in = shape[0] · block features to
    width_out = shape[1] · block ones, and the parameter is [count, block, block].
    """

    block: int
    shape: tuple[int, int]  # in blocks
    rows: tuple[int, ...]  # of each block, sorted
    columns: tuple[int, ...]  # of each block, sorted within a row

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def width_in(self) -> int:
        return self.shape[0] * self.block

    @property
    def width_out(self) -> int:
        return self.shape[1] * self.block

    @property
    def mask(self) -> Bool[np.ndarray, "rows columns"]:
        mask = np.zeros(self.shape, bool)
        mask[self.rows, self.columns] = True
        return mask


def from_mask(mask: Bool[np.ndarray, "rows columns"], block: int) -> Layout:
    """The layout of the blocks for which the mask is True."""
    rows, columns = np.nonzero(mask)
    return Layout(block, tuple(map(int, mask.shape)), tuple(map(int, rows)), tuple(map(int, columns)))


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What a config says of a layout. `rows_of` is all that the patterns differ in."""

    block: Size = 128  # rows and columns of one block; a TPU needs a multiple of 128
    density: Annotated[float, Range(above=0, most=1)] = 0.125  # share of the blocks that exist
    seed: Annotated[int, Range(least=0, most=2**32 - 1)] = 0

    def mask(self, rows: int, columns: int) -> Bool[np.ndarray, "rows columns"]:
        """The blocks that exist; the same for the same options. At least max(rows, columns) blocks are needed."""
        # RandomState, whose stream is frozen (NEP 19): a checkpoint must mean the same matrix under a later NumPy.
        random = np.random.RandomState(self.seed)
        ends = np.arange(columns + 1) * self.blocks(rows, columns) // columns
        mask = np.zeros((rows, columns), bool)
        for column, count in enumerate(np.diff(ends)):
            mask[self.rows_of(column, int(count), mask, random), column] = True
        for row in np.flatnonzero(~mask.any(axis=1)):
            _fill(mask, row)
        return mask

    def blocks(self, rows: int, columns: int) -> int:
        return round(self.density * rows * columns)

    def rows_of(self, column: int, count: int, mask: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """`count` different rows for the column, given the columns before it."""
        raise NotImplementedError


def _fill(mask: np.ndarray, row: int) -> None:
    """Moves one block into an empty row, within its column, from the nearest row that has one to spare."""
    spare = np.flatnonzero(mask.sum(axis=1) > 1)
    source = spare[np.abs(spare - row).argmin()]
    column = np.flatnonzero(mask[source])[-1]
    mask[source, column], mask[row, column] = False, True


class Random(Pattern):
    """Rows drawn at random among those used least so far, so that the rows' counts too differ by one at most."""

    def rows_of(self, column, count, mask, random):
        order = random.permutation(len(mask))
        return order[np.argsort(mask.sum(axis=1)[order], kind="stable")][:count]


class BlockDiagonal(Pattern):
    """1 / density groups of consecutive rows, each with its consecutive columns: a grouped matrix (Krizhevsky et al.
    2012). Where 1 / density does not divide both, neighbours overlap."""

    def rows_of(self, column, count, mask, random):
        rows, columns = mask.shape
        groups = min(rows, columns, round(1 / self.density))
        return (column * groups // columns * rows // groups + np.arange(count)) % rows


class Banded(Pattern):
    """A band around the diagonal that wraps around: the ring lattice of Watts and Strogatz 1998 with two kinds of
    vertices."""

    def rows_of(self, column, count, mask, random):
        rows, columns = mask.shape
        start = math.ceil((column + 0.5) * rows / columns - 0.5 - count / 2)
        return (start + np.arange(count)) % rows


@dataclass(frozen=True, kw_only=True)
class SmallWorld(Banded):
    """The band with each block moved, with probability `rewire`, to a random free row of its column (Watts and Strogatz
    1998, "Collective dynamics of small-world networks"): still mostly local, but a few layers connect everything."""

    rewire: Share = 0.2

    def rows_of(self, column, count, mask, random):
        chosen = super().rows_of(column, count, mask, random)
        for place in np.flatnonzero(random.random_sample(count) < self.rewire):
            free = np.setdiff1d(np.arange(len(mask)), chosen)
            if len(free):
                chosen[place] = random.choice(free)
        return chosen


class ScaleFree(Pattern):
    """A graph that grows (Barabási and Albert 1999, "Emergence of scaling in random networks"): rows and columns join
    one by one; a column takes the rows that joined with it, then others in proportion to the blocks that they have. So
    the first rows reach most columns and most rows reach few."""

    def rows_of(self, column, count, mask, random):
        rows, columns = mask.shape
        joined = max(count, -(-(column + 1) * rows // columns))
        degree = mask[:joined].sum(axis=1)
        new, old = np.flatnonzero(degree == 0)[:count], np.flatnonzero(degree)
        if len(new) == count:
            return new
        p = degree[old] / degree.sum()
        return np.concatenate([new, random.choice(old, count - len(new), replace=False, p=p)])


LAYOUTS: dict[str, Callable[..., Pattern]] = {
    "random": Random,
    "block_diagonal": BlockDiagonal,
    "banded": Banded,
    "small_world": SmallWorld,
    "scale_free": ScaleFree,
}


def layout(choice: Choice, width_in: int, width_out: int, what: str) -> Layout:
    """The layout that a config's choice, found at the field `what`, gives a matrix of width_in × width_out.

    Raises `UserError` for a name or option that does not exist, a value out of its range, a block that does not divide
    both widths, and a density so low that a row or column of blocks would be empty.
    """
    pattern = create(what, LAYOUTS, choice)
    block, density, at = pattern.block, pattern.density, f"{what}.options"
    if width_in % block or width_out % block:
        fit = nearest_divisor(block, width_in, width_out)
        matrix = f"a matrix of {width_in} × {width_out}"
        raise UserError(f"{at}.block is {block}, which does not divide {matrix}; the nearest that does is {fit}")
    rows, columns = width_in // block, width_out // block
    if (count := pattern.blocks(rows, columns)) < max(rows, columns):
        raise UserError(
            f"{at}.density is {density}, {count} of {rows} × {columns} blocks of {block}, which leaves a row or column "
            f"without any; it must be at least {math.ceil(1e4 / min(rows, columns)) / 1e4}"
        )
    return _built(pattern, rows, columns)


@functools.cache
def _built(pattern: Pattern, rows: int, columns: int) -> Layout:
    return from_mask(pattern.mask(rows, columns), pattern.block)
