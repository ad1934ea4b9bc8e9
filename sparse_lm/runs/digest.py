"""A digest of each array, so that a single flipped bit in a checkpoint is noticed.

Storage and Orbax find what is missing or cut short, not what silently changed. A digest is a sum over the elements of
numbers made from an element's bits and its place, so it is computed where the shards are, nothing is gathered, and,
integer sums modulo 2^32 being the same in any order, it is equal on every mesh and for any number of processes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array | np.ndarray | np.generic


def digests(arrays: dict[str, Array]) -> dict[str, int]:
    """The digest of each array, 64 bits, on the host.

    An array may be sharded, over several processes too, where every process must call this with the same arrays. A
    NumPy array must be the same in every process. Shape and element type are not part of the digest. Raises `TypeError`
    for elements wider than 32 bits.

    The upper half is the sum of bits × an odd number, the lower of an invertible mix of bits and place: a change of one
    element always changes both, and elements that trade places change the lower one.
    """
    for name, array in arrays.items():
        if np.dtype(array.dtype).itemsize > 4:
            raise TypeError(f"{name} is {array.dtype}; only elements of up to 32 bits have a digest")
    # One after the other: programs with collectives must not run at the same time on several CPU devices, which then
    # wait for each other for ever.
    halves = {name: jax.device_get(_compiled(_mesh(arrays[name]))(arrays[name])) for name in sorted(arrays)}
    return {name: int(halves[name][0]) << 32 | int(halves[name][1]) for name in arrays}


def _mesh(array: Array) -> Mesh | None:
    sharding = getattr(array, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


@functools.cache
def _compiled(mesh: Mesh | None):
    """One program per mesh, shape and element type: a model's layers share theirs. Every process gets the whole sum."""
    return jax.jit(_halves, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _halves(array: jax.Array) -> jax.Array:
    """uint32[2], of an array of any shape."""
    bits = _bits(array)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = np.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * stride
    # Sums of uint32 wrap around; jnp.sum would otherwise widen them where 64 bits are enabled.
    linear = jnp.sum(bits * (_mix(place) | 1), dtype=jnp.uint32)
    mixed = jnp.sum(_mix(bits ^ _mix(place ^ np.uint32(0x9E3779B9))), dtype=jnp.uint32)
    return jnp.stack([linear, mixed])


def _bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """An invertible map of 32 bits in which every bit depends on every other (the finalizer of MurmurHash3)."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
