import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sparse_lm.data.pipeline import Batches, Interleaved, Prefetch, device_batch

LENGTH = 4


class Rows:
    """Stored rows that can be told apart, and a record of which were read."""

    def __init__(self, n, base=0):
        self.n, self.base, self.seen = n, base, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.seen.append(i)
        return {
            "tokens": np.arange(LENGTH + 1, dtype=np.int32) + 10 * i + self.base,
            "segments": np.ones(LENGTH, np.int32),
            "bytes": np.int32(i + 1),
        }


def test_reads_only_the_rows_asked_for():
    rows = Rows(20)
    got = Batches(rows, 6, LENGTH, 3).read(2, 1, 4)
    assert rows.seen == [13, 14, 15]
    assert got["inputs"][:, 0].tolist() == [130, 140, 150]
    assert got["targets"][:, 0].tolist() == [131, 141, 151]
    assert got["bytes"].tolist() == [14, 15, 16]
    assert {name: (value.shape, value.dtype.name) for name, value in got.items()} == {
        "inputs": ((3, LENGTH), "int32"),
        "targets": ((3, LENGTH), "int32"),
        "segments": ((3, LENGTH), "int32"),
        "positions": ((3, LENGTH), "int32"),
        "bytes": ((3,), "int32"),
    }


def test_the_last_batch_is_filled_with_padding():
    batches = Batches(Rows(5), 4, LENGTH, 2)
    got = batches.read(1, 0, 4)
    assert got["segments"].any(1).tolist() == [True, False, False, False]
    assert not any(got[name][1:].any() for name in got)


@pytest.mark.parametrize("step, start, stop", [(-1, 0, 1), (2, 0, 1), (0, 0, 5), (0, 3, 2)])
def test_what_is_not_there_is_an_index_error(step, start, stop):
    with pytest.raises(IndexError):
        Batches(Rows(5), 4, LENGTH, 2).read(step, start, stop)


def test_first_rows_are_shared_by_weight_and_all_rows_come_once():
    parts = [Rows(40), Rows(10, base=10_000)]
    order = Interleaved(parts, [1.0, 3.0])
    first = [int(order[i]["tokens"][0]) for i in range(len(order))]
    assert len(set(first)) == 50
    assert sum(x >= 10_000 for x in first[:8]) == 6
    assert [int(row["tokens"][0]) for row in Interleaved(parts, [1.0, 3.0], 12)] == first[:12]


def test_first_rows_are_spread_over_the_part():
    order = Interleaved([Rows(1000)], [1.0], 50)
    first = np.sort([int(row["tokens"][0]) // 10 for row in order])
    assert np.diff([0, *first, 1000]).max() < 3 * 1000 / 50


def check_device_batches():
    """In a process with four devices."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in ((), ("x",), ("x", None), (None, "y"), ("x", "y"), (("x", "y"), None)):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        rows = Rows(40)
        batches = Batches(rows, 8, LENGTH, 5)
        arrays = device_batch(batches, 3, 8, sharding)
        assert sorted(rows.seen) == list(range(24, 32))  # each row once
        want = batches.read(3, 0, 8)
        for name, value in want.items():
            np.testing.assert_array_equal(arrays[name], value)
        assert arrays["inputs"].sharding == sharding


def test_device_arrays_equal_the_batch_however_they_are_sharded():
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    code = "import test_pipeline; test_pipeline.check_device_batches()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, cwd=os.path.dirname(__file__), check=True)


def test_prefetch_gives_all_values_in_order():
    with Prefetch(lambda i: i * i, 3, 8) as values:
        assert list(values) == [9, 16, 25, 36, 49]


def test_prefetch_works_ahead_but_no_further_than_its_depth():
    made, full = [], threading.Event()

    def make(i):
        made.append(i)
        if len(made) == 3:
            full.set()
        return i

    with Prefetch(make, 0, 100, depth=3) as values:
        assert full.wait(5)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        assert next(values) == 0


def test_prefetch_counts_only_the_time_that_its_consumer_waits():
    second = threading.Event()

    def make(i):
        if i == 0:
            time.sleep(0.5)
        else:
            second.set()

    with Prefetch(make, 0, 2) as values:
        next(values)
        waited = values.wait_seconds
        assert waited > 0.2
        assert second.wait(60)
        next(values)
        assert values.wait_seconds - waited < waited  # it was there already


def test_an_exception_comes_where_its_value_would_have_come():
    def make(i):
        if i == 2:
            raise OSError("bad disk")
        return i

    values = Prefetch(make, 0, 5)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(OSError, match="bad disk"):
        next(values)
    with pytest.raises(StopIteration):
        next(values)


def test_closing_ends_the_thread_and_the_iteration():
    before = threading.active_count()
    values = Prefetch(lambda i: i, 0, 1000)
    next(values)
    values.close()
    assert threading.active_count() == before
    assert list(values) == []
