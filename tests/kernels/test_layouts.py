"""The layouts of block-sparse matrices, against slow loops over their graphs."""

import itertools
import math

import numpy as np
import pytest

from sparse_lm.config import choice
from sparse_lm.errors import UserError
from sparse_lm.layouts import LAYOUTS, build_layout, layout_from_mask

SHAPES = ((16, 16), (8, 32), (32, 8), (12, 40), (7, 5), (1, 6))
DENSITIES = (0.2, 0.25, 1 / 3, 0.5, 1.0)


CASES = [
    (name, *shape, density)
    for name, shape, density in itertools.product(LAYOUTS, SHAPES, DENSITIES)
    if round(density * shape[0] * shape[1]) >= max(shape)
]


def made(name, rows, columns, density, block=4, **options):
    return build_layout(
        choice(name, density=density, block=block, **options), rows * block, columns * block, "model.layout"
    )


@pytest.mark.parametrize("name, rows, columns, density", CASES)
def test_exactly_as_many_blocks_as_the_density_says_spread_over_all_rows_and_columns(name, rows, columns, density):
    found = made(name, rows, columns, density)
    pairs = list(zip(found.rows, found.columns))
    assert len(set(pairs)) == len(pairs) == found.num_blocks == round(density * rows * columns)
    assert pairs == sorted(pairs)
    assert set(found.rows) == set(range(rows)) and set(found.columns) == set(range(columns))
    per_column = [found.columns.count(column) for column in range(columns)]
    assert max(per_column) - min(per_column) <= 1
    assert layout_from_mask(found.mask, found.block) == found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_seed_decides(name):
    one, same, other = (made(name, 32, 32, 0.25, seed=seed) for seed in (3, 3, 4))
    assert one == same and hash(one) == hash(same)
    assert (one != other) == (name in ("random", "small_world", "scale_free"))


def test_a_layout_does_not_change_from_version_to_version():
    """A checkpoint holds blocks alone: another layout would silently be another matrix."""
    digits = lambda numbers: "".join(map(str, numbers))
    found = {name: made(name, 4, 6, 0.5, seed=1) for name in LAYOUTS}
    assert {name: (digits(one.rows), digits(one.columns)) for name, one in found.items()} == {
        "random": ("000111222333", "135135024024"),
        "block_diagonal": ("000111222333", "012012345345"),
        "banded": ("000111222333", "015123234045"),
        "small_world": ("001112223333", "051232340145"),
        "scale_free": ("000000111123", "012345012534"),
    }


def test_random_rows_have_equal_counts():
    counts = made("random", 24, 32, 0.2).mask.sum(axis=1)
    assert counts.max() - counts.min() <= 1


def test_block_diagonal_is_a_matrix_of_groups():
    expected = np.kron(np.eye(4), np.ones((2, 8)))
    np.testing.assert_array_equal(made("block_diagonal", 8, 32, 0.25).mask, expected)


def test_banded_is_a_ring():
    expected = [[(i - j) % 9 in (0, 1, 8) for j in range(9)] for i in range(9)]
    np.testing.assert_array_equal(made("banded", 9, 9, 1 / 3).mask, expected)


def path_length(mask: np.ndarray) -> float:
    """Mean number of layers, each with this layout, after which a row's features reach a column: by breadth first."""
    size, total = len(mask), 0
    for start in range(size):
        distance, frontier = {}, {start}
        for step in itertools.count(1):
            frontier = {int(j) for i in frontier for j in np.flatnonzero(mask[i])} - distance.keys()
            if not frontier:
                break
            distance |= dict.fromkeys(frontier, step)
        assert len(distance) == size
        total += sum(distance.values())
    return total / size**2


def test_a_small_world_has_short_paths_and_stays_local():
    """Watts and Strogatz 1998, figure 2: a few random blocks shorten the paths long before the band is gone."""
    band, small = made("banded", 64, 64, 1 / 16).mask, made("small_world", 64, 64, 1 / 16, rewire=0.1).mask
    assert path_length(small) < 0.5 * path_length(band)
    assert (band & small).sum() > 0.8 * band.sum()
    np.testing.assert_array_equal(made("small_world", 64, 64, 1 / 16, rewire=0.0).mask, band)


def test_all_is_moved_where_everything_is_rewired():
    band, moved = made("banded", 32, 32, 0.125).mask, made("small_world", 32, 32, 0.125, rewire=1.0).mask
    assert (band & moved).sum() < 0.3 * band.sum()


def test_scale_free_rows_have_a_heavy_tail():
    """Their largest counts are far above those of rows drawn independently, and most rows are below the mean."""
    drawn = made("small_world", 64, 256, 1 / 32, rewire=1.0).mask.sum(axis=1)
    grown = made("scale_free", 64, 256, 1 / 32).mask.sum(axis=1)
    assert drawn.mean() == grown.mean() == 8
    assert grown.max() > 3 * drawn.max() and grown.std() > 3 * drawn.std()
    assert np.median(grown) <= 5 < 7 <= np.median(drawn)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("smal_world", {}, "did you mean 'small_world'"),
        ("banded", {"rewire": 0.1}, "rewire is not an option of banded"),
        ("small_world", {"rewire": 1.5}, "rewire is 1.5; it must be at least 0 and at most 1"),
        ("banded", {"density": 0.0}, "density is 0.0; it must be above 0 and at most 1"),
        ("banded", {"density": 1.25}, "density is 1.25; it must be above 0 and at most 1"),
        ("banded", {"density": "1/8"}, "density is '1/8'; it must be of type float"),
        ("random", {"seed": -1}, "seed is -1; it must be at least 0"),
        ("random", {"block": 0}, "block is 0; it must be at least 1"),
        ("random", {"block": 100}, "block is 100, which .*; the nearest that does is 128"),
        ("random", {"block": 60}, "block is 60, which .*; the nearest that does is 64"),
        ("random", {"block": 32, "density": 0.1}, "10 of 8 × 12 blocks of 32, .* must be at least 0.125$"),
    ],
)
def test_mistakes_are_one_line(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        build_layout(choice(name, **options), 256, 384, "model.layout")
    assert "\n" not in str(error.value) and str(error.value).startswith("model.layout")


def test_the_least_density_that_is_named_is_enough():
    for rows, columns in SHAPES:
        made("random", rows, columns, math.ceil(1e4 / min(rows, columns)) / 1e4)
