"""Names per logical layer, so that a checkpoint does not depend on how layers are grouped for the scan.

In memory the layers of one place of the period are stacked: `period/1/attention/query` of shape [n, …]. In a checkpoint
each is by itself: `layer_003/attention/query`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sparse_lm import config as configs


def names(path: tuple) -> tuple:
    """The keys of a path in a tree: of dicts, named tuples and sequences alike."""
    return tuple(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)


def logical(model: configs.Model, path: tuple) -> list[str] | str:
    """The checkpoint's name of an array at a path, or the names of its n slices where it is stacked."""
    keys = names(path)
    if "period" in keys:
        at = keys.index("period")
        before, place, after = keys[:at], keys[at + 1], keys[at + 2 :]
        layer = lambda n: f"layer_{model.dense_first + n * model.expert_every + place:03d}"
        return [_join(*before, layer(n), *after) for n in range(model.periods)]
    if "prefix" in keys:
        at = keys.index("prefix")
        return _join(*keys[:at], f"layer_{keys[at + 1]:03d}", *keys[at + 2 :])
    return _join(*keys)


def _join(*keys: Any) -> str:
    return "/".join(str(key) for key in keys)


def unstack(model: configs.Model, tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by their names in a checkpoint; slices of stacked ones are new arrays."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = logical(model, path)
        flat |= {name: leaf} if isinstance(name, str) else {n: leaf[i] for i, n in enumerate(name)}
    return flat


def abstract_slices(model: configs.Model, abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `unstack` would give for an abstract tree with shardings, allocating nothing."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        name = logical(model, path)
        if isinstance(name, str):
            flat[name] = leaf
        else:
            place = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            flat |= {n: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place) for n in name}
    return flat


def stack(model: configs.Model, flat: dict[str, jax.Array], abstract: Any) -> Any:
    """The tree that `unstack` came from, laid out as the abstract one says."""

    def collect(flat):
        def leaf(path, _):
            name = logical(model, path)
            return flat[name] if isinstance(name, str) else jnp.stack([flat[n] for n in name])

        return jax.tree.map_with_path(leaf, abstract)

    return jax.jit(collect, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(flat)
