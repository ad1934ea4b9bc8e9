"""Batches as a pure function of their number, their arrays on the devices, and reading ahead."""

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
    """The first rows (0: all) of several stored parts, in turns by weight, each part's rows evenly spread."""

    def __init__(self, parts: Sequence[Sequence], weights: Sequence[float], rows: int = 0):
        self._parts = parts
        sizes = [len(part) for part in parts]
        turns = np.concatenate([(np.arange(n) + 0.5) / w for n, w in zip(sizes, weights, strict=True)])
        order = np.argsort(turns, kind="stable")[: rows or None]
        self._part = np.repeat(np.arange(len(parts)), sizes)[order]
        self._row = np.concatenate([_spread_order(n) for n in sizes])[order]

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> dict:
        return self._parts[self._part[index]][int(self._row[index])]


def _spread_order(n: int) -> np.ndarray:
    """0 … n-1, every beginning spread evenly: by the fractional parts of multiples of the golden ratio."""
    return np.argsort(np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), kind="stable")


class Batches:
    """Batches of rows; row j of batch i is row i * batch + j, padding after the last one."""

    def __init__(self, rows: Sequence, batch: int, length: int, count: int):
        self._rows, self.batch, self.length, self._count = rows, batch, length, count

    def __len__(self) -> int:
        """The number of batches; sys.maxsize where the rows are repeated without end."""
        return self._count

    def read(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start … stop-1 of batch `step`; no other rows are read.

        Returns:
          `inputs`, `targets`, `segments` (1, 2, … in a row; 0 is padding), `positions`: int32 [stop - start, L];
          `bytes`: int32 [stop - start], of text in the row's targets.

        Raises:
          IndexError: no such batch or row.
        """
        if not (0 <= step < self._count and 0 <= start <= stop <= self.batch):
            what = f"rows {start} to {stop} of batch {step}"
            raise IndexError(f"{what}: there are {self._count} batches of {self.batch} rows")
        tokens = np.zeros((stop - start, self.length + 1), np.int32)
        segments = np.zeros((stop - start, self.length), np.int32)
        sizes = np.zeros(stop - start, np.int32)
        first = step * self.batch + start
        for i in range(min(stop - start, max(0, len(self._rows) - first))):
            row = self._rows[first + i]
            tokens[i], segments[i], sizes[i] = row["tokens"], row["segments"], row["bytes"]
        return unpack_rows(tokens, segments) | {"bytes": sizes}


def device_batch(batches: Batches, step: int, batch: int, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """Batch `step` as global arrays, [B, L] and `bytes` [B]; this process reads the rows that its devices hold.

    The sharding is that of the [B, L] arrays; only its first axis counts for `bytes`.
    """
    read = {}

    def rows(index: tuple[slice, ...]) -> dict[str, np.ndarray]:
        span = index[0].indices(batch)[:2]
        if span not in read:
            read[span] = batches.read(step, *span)
        return read[span]

    by_row = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    arrays = {
        name: jax.make_array_from_callback(
            (batch, batches.length), sharding, lambda index, name=name: rows(index)[name][:, index[1]]
        )
        for name in ("inputs", "targets", "segments", "positions")
    }
    return arrays | {"bytes": jax.make_array_from_callback((batch,), by_row, lambda index: rows(index)["bytes"])}


class Prefetch(Generic[T], Iterator[T]):
    """make(start) … make(stop - 1), computed in order by one thread, up to `depth` of them ahead of their use.

    An exception of `make` is raised by the `next` that would have given its value, and ends the iteration. Closing, or
    leaving the context, waits for the value that is being made and drops it.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2):
        self.wait_seconds = 0.0  # that the consumer has waited so far
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
        begin = time.perf_counter()
        try:
            value = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - begin
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
