"""Names per logical layer, so that a checkpoint does not depend on how layers are grouped for the scan.

In memory the layers of one place of the period are stacked: `period/1/attention/query` of shape [n, …], and router
state over all routed layers: `routed/bias` of shape [R, …]. In a checkpoint each layer is by itself:
`layer_003/attention/query`, `layer_003/bias`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sparse_lm.parameter import key_names
from sparse_lm.stack import Stack


def checkpoint_names(stack: Stack, path: tuple) -> list[str] | str:
    """The checkpoint's name of an array at a path, or the names of its slices where it is stacked."""
    keys = key_names(path)
    join = lambda *keys: "/".join(str(key) for key in keys)
    for at, key in enumerate(keys):
        if key in ("prefix", "period"):
            numbers, inside = stack.layer_numbers(key, keys[at + 1]), keys[at + 2 :]
        elif key == "routed":
            numbers, inside = stack.routed_layers, keys[at + 1 :]
        else:
            continue
        names = [join(*keys[:at], f"layer_{number:03d}", *inside) for number in numbers]
        return names[0] if key == "prefix" else names
    return join(*keys)


def slice_layers(stack: Stack, tree: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by their names in a checkpoint; slices of stacked ones are new arrays."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = checkpoint_names(stack, path)
        flat |= {name: leaf} if isinstance(name, str) else {n: leaf[i] for i, n in enumerate(name)}
    return flat


def abstract_slices(stack: Stack, abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `slice_layers` would give for an abstract tree with shardings, allocating nothing."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        name = checkpoint_names(stack, path)
        if isinstance(name, str):
            flat[name] = leaf
        else:
            place = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            flat |= {n: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place) for n in name}
    return flat


def stack_layers(stack: Stack, flat: dict[str, jax.Array], abstract: Any) -> Any:
    """The tree that `slice_layers` cut, laid out as the abstract one says."""

    def collect(flat):
        def leaf(path, _):
            name = checkpoint_names(stack, path)
            return flat[name] if isinstance(name, str) else jnp.stack([flat[n] for n in name])

        return jax.tree.map_with_path(leaf, abstract)

    return jax.jit(collect, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(flat)
