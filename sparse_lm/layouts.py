"""Which blocks of a block-sparse weight matrix exist (Gray, Radford and Kingma 2017, "GPU kernels for block-sparse
weights"). Pure NumPy: a layout is known when a program is built, and parameters and FLOPs are counted from it.

Every pattern keeps exactly round(density · rows · columns) blocks and leaves no row or column empty. The numbers of
blocks in two columns differ by at most one, because equal counts make the product fast.
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
    """The blocks of a matrix [width_in, width_out] that exist. Hashable, so that it can be a static argument.

    The parameter is [num_blocks, block, block], in row-major order of the blocks.

    Attributes:
        block: rows and columns of one block.
        shape: rows and columns of the matrix, in blocks.
        rows: the row of each block, sorted.
        columns: the column of each block, sorted within a row.
    """

    block: int
    shape: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
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


def layout_from_mask(mask: Bool[np.ndarray, "rows columns"], block: int) -> Layout:
    """Builds the layout of the blocks for which the mask is True."""
    rows, columns = np.nonzero(mask)
    return Layout(block, tuple(map(int, mask.shape)), tuple(map(int, rows)), tuple(map(int, columns)))


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The options of a layout in a config. Patterns differ in `choose_rows` alone."""

    block: Size = 128  # rows and columns of one block; a TPU needs a multiple of 128
    density: Annotated[float, Range(above=0, most=1)] = 0.125  # share of the blocks that exist
    seed: Annotated[int, Range(least=0, most=2**32 - 1)] = 0

    def mask(self, rows: int, columns: int) -> Bool[np.ndarray, "rows columns"]:
        """Marks the blocks that exist, which the options determine. Needs at least max(rows, columns) blocks."""
        # RandomState, whose stream is frozen (NEP 19): a checkpoint must mean the same matrix under a later NumPy.
        random = np.random.RandomState(self.seed)
        ends = np.arange(columns + 1) * self.count_blocks(rows, columns) // columns
        mask = np.zeros((rows, columns), bool)
        for column, count in enumerate(np.diff(ends)):
            mask[self.choose_rows(column, int(count), mask, random), column] = True
        for row in np.flatnonzero(~mask.any(axis=1)):
            _fill_row(mask, row)
        return mask

    def count_blocks(self, rows: int, columns: int) -> int:
        return round(self.density * rows * columns)

    def choose_rows(self, column: int, count: int, mask: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Chooses `count` different rows for a column; the mask holds the columns before it."""
        raise NotImplementedError


def _fill_row(mask: np.ndarray, row: int) -> None:
    """Moves a block within its column into an empty row, from the nearest row that has more than one block."""
    spare = np.flatnonzero(mask.sum(axis=1) > 1)
    source = spare[np.abs(spare - row).argmin()]
    column = np.flatnonzero(mask[source])[-1]
    mask[source, column], mask[row, column] = False, True


class Random(Pattern):
    """Random rows among those with the fewest blocks, so that the numbers of blocks per row differ by at most one."""

    def choose_rows(self, column, count, mask, random):
        order = random.permutation(len(mask))
        return order[np.argsort(mask.sum(axis=1)[order], kind="stable")][:count]


class BlockDiagonal(Pattern):
    """1 / density groups of consecutive rows and columns: a grouped matrix (Krizhevsky et al. 2012). Groups overlap
    where 1 / density does not divide both."""

    def choose_rows(self, column, count, mask, random):
        rows, columns = mask.shape
        groups = min(rows, columns, round(1 / self.density))
        return (column * groups // columns * rows // groups + np.arange(count)) % rows


class Banded(Pattern):
    """A band around the diagonal that wraps around: the ring lattice of Watts and Strogatz 1998 between rows and
    columns."""

    def choose_rows(self, column, count, mask, random):
        rows, columns = mask.shape
        start = math.ceil((column + 0.5) * rows / columns - 0.5 - count / 2)
        return (start + np.arange(count)) % rows


@dataclass(frozen=True, kw_only=True)
class SmallWorld(Banded):
    """The band, each block moved to a random free row of its column with probability `rewire` (Watts and Strogatz 1998,
    "Collective dynamics of small-world networks"): mostly local, yet a few layers connect all features."""

    rewire: Share = 0.2

    def choose_rows(self, column, count, mask, random):
        band = super().choose_rows(column, count, mask, random)
        for i in np.flatnonzero(random.random_sample(count) < self.rewire):
            free = np.setdiff1d(np.arange(len(mask)), band)
            if len(free):
                band[i] = random.choice(free)
        return band


class ScaleFree(Pattern):
    """A growing graph (Barabási and Albert 1999, "Emergence of scaling in random networks"). Rows and columns join one
    by one. A column takes the rows that joined with it, then others in proportion to their numbers of blocks, so that
    the first rows reach most columns and most rows reach few."""

    def choose_rows(self, column, count, mask, random):
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


def build_layout(choice: Choice, width_in: int, width_out: int, field: str) -> Layout:
    """Builds the layout of a matrix.

    Args:
        choice: the pattern and its options.
        width_in: rows of the matrix.
        width_out: columns of the matrix.
        field: the config's field of the choice, for messages.

    Raises:
        UserError: for an unknown name or option, a value out of range, a block that does not divide both widths, or a
            density so low that a row or column of blocks would be empty.
    """
    pattern = create(field, LAYOUTS, choice)
    block, density, options = pattern.block, pattern.density, f"{field}.options"
    if width_in % block or width_out % block:
        fit = nearest_divisor(block, width_in, width_out)
        matrix = f"a matrix of {width_in} × {width_out}"
        raise UserError(f"{options}.block is {block}, which does not divide {matrix}; the nearest that does is {fit}")
    rows, columns = width_in // block, width_out // block
    if (count := pattern.count_blocks(rows, columns)) < max(rows, columns):
        raise UserError(
            f"{options}.density is {density}, {count} of {rows} × {columns} blocks of {block}, which leaves a row or "
            f"column without any; it must be at least {math.ceil(1e4 / min(rows, columns)) / 1e4}"
        )
    return _build_cached(pattern, rows, columns)


@functools.cache
def _build_cached(pattern: Pattern, rows: int, columns: int) -> Layout:
    return layout_from_mask(pattern.mask(rows, columns), pattern.block)
