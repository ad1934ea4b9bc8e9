import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.runs.digest import digests

DTYPES = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32, jnp.float16, jnp.uint8, jnp.bool_]


def random(dtype, shape, seed=0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    if dtype == jnp.bool_:
        return (raw[..., 0] % 2).astype(bool)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


def flipped(array: np.ndarray, bit: int) -> np.ndarray:
    raw = bytearray(array.tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)


def digest(array) -> int:
    return digests({"a": array})["a"]


def slow(array: np.ndarray) -> int:
    """The definition in Python's whole numbers, one element after the other."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    size = array.dtype.itemsize
    raw = array.tobytes()
    words = [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
    high = sum(word * (mix(place) | 1) for place, word in enumerate(words)) % 2**32
    low = sum(mix(word ^ mix(place ^ 0x9E3779B9)) for place, word in enumerate(words)) % 2**32
    return high << 32 | low


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_is_the_sum_it_says(dtype, shape):
    array = random(dtype, shape)
    assert digest(jnp.asarray(array)) == digest(array) == slow(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_both_halves(dtype):
    array = random(dtype, (3, 5))
    size = array.dtype.itemsize
    bits = range(0, array.nbytes * 8, 8) if dtype == jnp.bool_ else range(array.nbytes * 8)
    sums = digests({"whole": array} | {str(bit): flipped(array, bit) for bit in bits})
    whole = sums.pop("whole")
    assert len(sums) == (15 if dtype == jnp.bool_ else 15 * 8 * size)
    assert all(s >> 32 != whole >> 32 and s % 2**32 != whole % 2**32 for s in sums.values())


def test_elements_that_trade_places_are_noticed():
    array = np.array([1.0, -1.0, 2.0, 0.5, -2.0, 3.0], np.float32)  # a number and its negative differ in the top bit
    swaps = {}
    for i in range(6):
        for j in range(i):
            order = np.arange(6)
            order[[i, j]] = order[[j, i]]
            swaps[f"{i},{j}"] = array[order]
    assert digest(array) not in digests(swaps).values()
    assert digest(array[::-1].copy()) != digest(array)


def test_negative_zero_and_the_kind_of_nan_count():
    words = np.array([0, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32)
    assert len(set(digests({str(i): jnp.asarray(w.view(np.float32)) for i, w in enumerate(words)}).values())) == 5


def test_an_empty_array_has_a_digest_and_none_is_asked_for_in_vain():
    assert digest(jnp.zeros((0, 4))) == 0
    assert digests({}) == {}


def test_wider_elements_are_refused_by_name():
    with pytest.raises(TypeError, match="count is int64"):
        digests({"count": np.arange(3)})


SHARDED = """
import json, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sparse_lm.runs.digest import _compiled, digests
assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
found = []
for dtype in ("float32", "bfloat16", "int32", "bool"):
    array = np.random.default_rng(1).integers(0, 2, (8, 16)).astype(dtype) * np.arange(128).reshape(8, 16).astype(dtype)
    for spec in (P(), P("x"), P("y"), P("x", "y"), P(None, "x"), P(("x", "y")), P(None, ("y", "x"))):
        sharded = jax.device_put(array, NamedSharding(mesh, spec))
        found.append([dtype, digests({"a": sharded})["a"], digests({"a": array})["a"]])
hlo = _compiled(mesh).lower(jax.device_put(array, NamedSharding(mesh, P("x", "y")))).compile().as_text()
print(json.dumps([found, "all-gather" in hlo, "all-reduce" in hlo]))
"""


def test_is_the_same_on_one_device_and_on_eight_however_sharded_and_gathers_nothing():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    found, gathers, reduces = json.loads(run.stdout)
    assert reduces and not gathers
    assert len(found) == 28
    assert all(sharded == single for _, sharded, single in found)
    assert len({single for _, _, single in found}) == 4
