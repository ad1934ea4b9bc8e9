"""Bytes of parameters, gradients and optimizer state, in total and on one device.

They are those of the state that `step` makes. Activations are not counted: what is kept of them is up to the compiler,
which reports it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh

from sparse_lm.config import Config, Mesh
from sparse_lm.mesh import AXES
from sparse_lm.models import functional
from sparse_lm.step.fit import check_fit
from sparse_lm.step.state import with_shardings
from sparse_lm.step.step import make_recipe


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def compute_memory(config: Config, mesh: Mesh | None = None) -> Memory:
    """Counts the bytes of a config's training state on one device.

    Args:
        config: resolved.
        mesh: its sizes, all given; by default one device, which holds everything.

    Raises:
        UserError: for what can't be trained.
        DoesNotFit: if the mesh does not divide the config's sizes.
    """
    devices = AbstractMesh(tuple(getattr(mesh or Mesh(data=1), axis) for axis in AXES), AXES)
    fns = functional(config.model)
    check_fit(config, devices, fns)
    optimizer = jax.eval_shape(make_recipe(config, fns).optimizer.init, fns.shapes)
    parameters = _local_bytes(with_shardings(fns.shapes, fns, devices))
    return Memory(parameters, parameters, _local_bytes(with_shardings(optimizer, fns, devices)))


def _local_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
