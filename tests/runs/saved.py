"""Small checkpoints of every kind of array, and what damages one."""

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

ITEMS = {
    "params": {
        "layers.0": {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5, jnp.bfloat16)},
        "scale": jnp.float32(3),
        "none": jnp.zeros((0, 4)),
    },
    "optimizer": (jnp.arange(3), {"mu": jnp.full((2, 2), 0.5), "big": jnp.arange(3, dtype=jnp.uint32)}),
    "router": {},
    "position": {"batch": np.int32(7), "flags": np.array([True, False])},
}
NAMES = ["params/layers.0/w", "params/layers.0/b", "params/scale", "optimizer/0", "optimizer/1/mu", "optimizer/1/big",
         "position/batch", "position/flags"]  # fmt: skip


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)), tree)


def shifted(by: int):
    return jax.tree.map(lambda a: a if a.dtype == bool else a + np.asarray(by, a.dtype), ITEMS)


def same(a, b) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def flip(step_folder, item: str, name: str) -> None:
    """One bit of one array, by decoding and storing it anew: the files are sound, the stored digest is the old one."""
    kvstore = {"driver": "ocdbt", "base": f"file://{step_folder / item}/", "path": f"{name}/"}
    store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    array = np.array(store.read().result())
    raw = bytearray(array.tobytes())
    raw[len(raw) // 2] ^= 1
    store.write(np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)).result()
