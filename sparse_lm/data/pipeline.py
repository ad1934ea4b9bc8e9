"""Batches as a pure function of their number, as arrays on the devices, and prefetching."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import jax
import numpy as np

from sparse_lm.data.packing import unpack_rows

T = TypeVar("T")


class Interleaved(Sequence):
    """The first rows of several parts, in turns by weight. The first n rows of a part are spread evenly over it.

    Args:
        parts: the rows of each part.
        weights: of each part.
        rows: how many rows; 0: all.
    """

    def __init__(self, parts: Sequence[Sequence], weights: Sequence[float], rows: int = 0):
        self._parts = parts
        sizes = [len(part) for part in parts]
        turns = np.concatenate([(np.arange(n) + 0.5) / w for n, w in zip(sizes, weights, strict=True)])
        order = np.argsort(turns, kind="stable")[: rows or None]
        part = np.repeat(np.arange(len(parts)), sizes)
        row = np.concatenate([_spread_order(n) for n in sizes])
        self.places = np.stack([part, row], axis=1)[order]  # [rows, 2], the part of each and its number there

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        part, row = self.places[index].tolist()
        return self._parts[part][row]


def _spread_order(n: int) -> np.ndarray:
    """Orders 0 … n - 1 by the fractional parts of multiples of the golden ratio: every prefix is spread evenly."""
    return np.argsort(np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), kind="stable")


class Batches:
    """`count` batches of rows of length L. Row j of batch i is row i · batch + j, or padding after all rows."""

    def __init__(self, rows: Sequence, batch: int, length: int, count: int):
        self.rows, self.batch, self.length, self._count = rows, batch, length, count

    def __len__(self) -> int:
        """Returns the number of batches; sys.maxsize if the rows repeat without end."""
        return self._count

    def read(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Reads rows start … stop - 1 of batch `step`, and no others.

        Returns:
            `inputs`, `targets`, `segments` (1, 2, … in a row; 0 is padding), `positions`: int32 [stop - start, L];
            `bytes`: int32 [stop - start], of text in the row's targets.

        Raises:
            IndexError: for an unknown batch or row.
        """
        if not (0 <= step < self._count and 0 <= start <= stop <= self.batch):
            rows = f"rows {start} to {stop} of batch {step}"
            raise IndexError(f"{rows}: there are {self._count} batches of {self.batch} rows")
        tokens = np.zeros((stop - start, self.length + 1), np.int32)
        segments = np.zeros((stop - start, self.length), np.int32)
        sizes = np.zeros(stop - start, np.int32)
        first = step * self.batch + start
        for i in range(min(stop - start, max(0, len(self.rows) - first))):
            row = self.rows[first + i]
            tokens[i], segments[i], sizes[i] = row["tokens"], row["segments"], row["bytes"]
        return unpack_rows(tokens, segments) | {"bytes": sizes}


def device_batch(batches: Batches, step: int, batch: int, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """Makes batch `step` as global arrays; this process reads only the rows that its devices hold.

    Args:
        batches: to read from.
        step: the number of the batch.
        batch: B.
        sharding: of the [B, L] arrays; its first axis is that of `bytes`.

    Returns:
        The arrays of `Batches.read`: `bytes` [B], the others [B, L].
    """
    cache = {}

    def rows(index: tuple[slice, ...]) -> dict[str, np.ndarray]:
        span = index[0].indices(batch)[:2]
        if span not in cache:
            cache[span] = batches.read(step, *span)
        return cache[span]

    by_row = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    arrays = {
        name: jax.make_array_from_callback(
            (batch, batches.length), sharding, lambda index, name=name: rows(index)[name][:, index[1]]
        )
        for name in ("inputs", "targets", "segments", "positions")
    }
    return arrays | {"bytes": jax.make_array_from_callback((batch,), by_row, lambda index: rows(index)["bytes"])}


class Prefetch(Generic[T], Iterator[T]):
    """Iterates over make(start) … make(stop - 1), which one thread computes in order, up to `depth` values ahead.

    `next` raises an exception of `make` in place of its value, which ends the iteration. Closing, or leaving the
    context, waits for the value in progress and discards it.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2):
        self.wait_seconds = 0.0  # total time that `next` has waited
        self._make = make
        self._numbers = iter(range(start, stop))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        for number in self._numbers:
            self._ahead.append(self._thread.submit(self._make, number))
            return

    def __next__(self) -> T:
        if not self._ahead:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            value = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - start
        self._submit()
        return value

    def close(self) -> None:
        self._numbers = iter(())
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
