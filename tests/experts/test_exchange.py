"""Rows that cross devices, against a loop that sends them one by one. `vmap` stands in for the devices of the axis."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_lm.experts.exchange import AXIS, exchange, fixed_size, room, to_experts
from tests import tiny

P, HERE, N, D = 3, 2, 12, 2
E = P * HERE


@pytest.mark.parametrize(
    "rows, devices, factor, expected",
    [
        (10, 4, math.inf, 40),
        (10, 4, 1.0, 10),
        (10, 4, 0.5, 5),
        (10, 4, 1.25, 13),
        (10, 4, 4.0, 40),
        (10, 4, 9.0, 40),
        (3, 2, 0.1, 1),
    ],
)
def test_room_is_the_rows_of_an_even_share_times_the_factor_rounded_up(rows, devices, factor, expected):
    assert room(rows, devices, factor) == expected


@functools.cache
def there_and_back(limit):
    """What each device is sent, and what comes back of it; the gradients of both."""

    def run(sizes, x):
        plan, expert, lost = to_experts(sizes, P, limit)
        arrived, back = jax.vjp(lambda x: exchange(x, plan, limit), x)
        returned, there = jax.vjp(lambda y: exchange(y, plan.back, N), arrived)
        return expert, lost, arrived, back(arrived)[0], returned, there(x)[0]

    return jax.jit(jax.vmap(run, axis_name=AXIS))


def send(sizes, x, limit):
    """The expert of each row that arrives, counted among those of its device, and the row; which rows were sent."""
    owner, arrived, sent = np.full((P, limit), -1), np.zeros((P, limit, D)), np.zeros((P, N), bool)
    for q in range(P):
        taken = 0
        for p in range(P):
            for e in range(q * HERE, (q + 1) * HERE):
                for row in range(sizes[p, :e].sum(), sizes[p, : e + 1].sum()):
                    if taken < limit:
                        owner[q, taken], arrived[q, taken], sent[p, row] = e - q * HERE, x[p, row], True
                        taken += 1
    return owner, arrived, sent


@pytest.mark.parametrize("limit", [1, 5, P * N])
@settings(max_examples=40, deadline=None)
@given(arrays(np.int32, (P, E), elements=st.integers(0, N // E)) | st.integers(0, E - 1))
def test_rows_go_to_their_experts_and_back_until_the_room_is_taken(limit, sizes):
    if np.ndim(sizes) == 0:  # all rows of all devices for one expert
        sizes = np.tile(N * (np.arange(E) == sizes), (P, 1)).astype(np.int32)
    x = 1 + np.arange(P * N * D, dtype=np.float32).reshape(P, N, D)
    owner, arrived, sent = send(sizes, x, limit)
    of_expert = np.arange(N) < sizes.sum(axis=1, keepdims=True)
    returned = np.where(sent[..., None], x, 0)
    lost = (of_expert & ~sent).sum(axis=1)
    # To send a gradient is to send rows: that of going is a way back, and that of coming back a way there.
    tiny.equal(there_and_back(limit)(sizes, x), (owner, lost, arrived, returned, returned, arrived))
    assert limit < P * N or not lost.any()


M = 10
ragged = jax.jit(jax.vmap(functools.partial(fixed_size, axis_name=AXIS), axis_name=AXIS))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_fixed_size_is_a_ragged_all_to_all(seed):
    """Pieces from anywhere to anywhere, as long as none is written over another; the rest of the output stays."""
    random = np.random.default_rng(seed)
    size = random.integers(0, M // P + 1, (P, P))
    start = random.integers(0, N - size + 1)
    arrive = np.zeros((P, P), int)
    for q in range(P):
        at = random.integers(0, M - size[:, q].sum() + 1)
        for p in random.permutation(P):
            arrive[p, q], at = at, at + size[p, q]
    x, output = random.normal(size=(P, N, D)), random.normal(size=(P, M, D))
    expected = output.copy()
    for p, q in np.ndindex(P, P):
        for i in range(size[p, q]):
            expected[q, arrive[p, q] + i] = x[p, start[p, q] + i]
    to32 = lambda *arrays: [a.astype(np.float32 if a.dtype.kind == "f" else np.int32) for a in arrays]
    found = ragged(*to32(x, output, start, size, arrive, size.T))
    tiny.equal(found, expected.astype(np.float32))
