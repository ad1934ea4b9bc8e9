"""Rows that cross devices, against a loop that sends them one by one. `vmap` stands in for the devices of the axis."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_lm.experts.exchange import AXIS, buffer_rows, exchange, padded_all_to_all, plan_exchange
from tests import tiny

P, EXPERTS_PER_DEVICE, N, D = 3, 2, 12, 2
E = P * EXPERTS_PER_DEVICE


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
def test_a_buffer_holds_an_even_share_times_the_factor_rounded_up(rows, devices, factor, expected):
    assert buffer_rows(rows, devices, factor) == expected


@functools.cache
def exchange_both_ways(limit):
    """What each device receives, and what returns to it; the gradients of both."""

    def run(sizes, x):
        plan, expert, not_sent = plan_exchange(sizes, P, limit)
        received, received_vjp = jax.vjp(lambda x: exchange(x, plan, limit), x)
        returned, returned_vjp = jax.vjp(lambda y: exchange(y, plan.reversed, N), received)
        return expert, not_sent, received, received_vjp(received)[0], returned, returned_vjp(x)[0]

    return jax.jit(jax.vmap(run, axis_name=AXIS))


def send(sizes, x, limit):
    """The expert of each row received, counted among those of its device, and the row; which rows were sent."""
    expert, received, sent = np.full((P, limit), -1), np.zeros((P, limit, D)), np.zeros((P, N), bool)
    for q in range(P):
        taken = 0
        for p in range(P):
            for e in range(EXPERTS_PER_DEVICE):
                number = q * EXPERTS_PER_DEVICE + e
                for row in range(sizes[p, :number].sum(), sizes[p, : number + 1].sum()):
                    if taken < limit:
                        expert[q, taken], received[q, taken], sent[p, row] = e, x[p, row], True
                        taken += 1
    return expert, received, sent


@pytest.mark.parametrize("limit", [1, 5, P * N])
@settings(max_examples=40, deadline=None)
@given(arrays(np.int32, (P, E), elements=st.integers(0, N // E)) | st.integers(0, E - 1))
def test_rows_go_to_their_experts_and_return_until_a_buffer_is_full(limit, sizes):
    if np.ndim(sizes) == 0:  # all rows of all devices for one expert
        sizes = np.tile(N * (np.arange(E) == sizes), (P, 1)).astype(np.int32)
    x = 1 + np.arange(P * N * D, dtype=np.float32).reshape(P, N, D)
    expert, received, sent = send(sizes, x, limit)
    of_expert = np.arange(N) < sizes.sum(axis=1, keepdims=True)
    returned = np.where(sent[..., None], x, 0)
    not_sent = (of_expert & ~sent).sum(axis=1)
    # A gradient is sent as rows are: the gradient of receiving returns rows, and that of returning sends them again.
    found = exchange_both_ways(limit)(sizes, x)
    tiny.equal(found, (expert, not_sent, received, returned, returned, received))
    assert limit < P * N or not not_sent.any()


M = 10
padded = jax.jit(jax.vmap(functools.partial(padded_all_to_all, axis_name=AXIS), axis_name=AXIS))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_a_padded_all_to_all_is_a_ragged_one(seed):
    """Pieces from anywhere to anywhere, as long as none is written over another; the rest of the output stays."""
    random = np.random.default_rng(seed)
    size = random.integers(0, M // P + 1, (P, P))
    send_start = random.integers(0, N - size + 1)
    receive_start = np.zeros((P, P), int)
    for q in range(P):
        row = random.integers(0, M - size[:, q].sum() + 1)
        for p in random.permutation(P):
            receive_start[p, q], row = row, row + size[p, q]
    x, output = random.normal(size=(P, N, D)), random.normal(size=(P, M, D))
    expected = output.copy()
    for p, q in np.ndindex(P, P):
        for i in range(size[p, q]):
            expected[q, receive_start[p, q] + i] = x[p, send_start[p, q] + i]
    to32 = lambda *arrays: [a.astype(np.float32 if a.dtype.kind == "f" else np.int32) for a in arrays]
    found = padded(*to32(x, output, send_start, size, receive_start, size.T))
    tiny.equal(found, expected.astype(np.float32))
