"""A run's program on the devices that there are, whatever mesh the run was trained on."""

import dataclasses
import logging
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, NamedSharding

from sparse_lm import config as configs
from sparse_lm.errors import DoesNotFit
from sparse_lm.mesh import AXES, RULES, make_mesh
from sparse_lm.paths import user_path
from sparse_lm.step.build import Build, build

log = logging.getLogger("sparse_lm")


def use_compilation_cache(config: configs.Config) -> None:
    """Keeps compiled programs over processes; the second start of a config compiles nothing.

    A folder that is set already, as by JAX_COMPILATION_CACHE_DIR, stays.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_path(config.cache) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def build_here(config: configs.Config, mesh: configs.Mesh | None = None, keep_batch: bool = False) -> Build:
    """A run's program on the devices that there are; it is `build`'s, and its config says what it was built for.

    Without `mesh` the config's is taken where it fits and does not leave every device all parameters. Otherwise they
    are divided over the devices: of all meshes that fit, the one that leaves a device the fewest bytes of them is
    taken, and the log says so. Devices are left out only where no mesh of all of them fits.

    Args:
        config: the run's.
        mesh: sizes to take in place of the config's.
        keep_batch: whether the batch and its accumulation must stay as in training, since steps are run again. Without
            it a batch is what a microbatch was, rounded up to what the devices divide.

    Raises `DoesNotFit` for a mesh that is asked for and does not fit, `UserError` as `build` does.
    """
    use_compilation_cache(config)

    def on(sizes: configs.Mesh, devices: list[jax.Device] | None = None) -> Build:
        made = make_mesh(sizes, devices)
        training = config.training if keep_batch else _evaluated_at_once(config, made)
        return build(configs.resolve(dataclasses.replace(config, mesh=sizes, training=training)), made)

    if mesh is not None:
        return on(mesh)
    try:
        program = on(config.mesh)
        if keep_batch or program.mesh.size == 1 or _divides(program):
            return program
        why = DoesNotFit("it would leave every device all parameters")
    except DoesNotFit as misfit:
        why = misfit
    log.info("the run's own mesh is not taken here: %s", why)
    devices = jax.devices()
    one = on(configs.Mesh(data=1), devices[:1])
    parameters, batch = (jax.tree.leaves(tree) for tree in (one.abstract_state.parameters, one.abstract_batch))
    # A process without a device of the mesh could not take part.
    for count in range(len(devices), 0, -1) if jax.process_count() == 1 else [len(devices)]:
        for held, sizes in _meshes(count, parameters, batch if keep_batch else []):
            try:
                program = on(sizes, devices[:count])
            except DoesNotFit:
                continue
            _log_mesh(sizes, count, held, _bytes_on_each(parameters, configs.Mesh(data=1)))
            return program
    raise why


def _divides(program: Build) -> bool:
    """Whether a device holds less than all of the parameters."""
    leaves = jax.tree.leaves(program.abstract_state.parameters)
    return any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in leaves)


def _evaluated_at_once(config: configs.Config, mesh: jax.sharding.Mesh) -> configs.Training:
    """The training of the config with a batch of whole rows and routing groups on every device, in one part."""
    training, size = config.training, config.model.group_size
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    rows = parts
    if config.model.experts:
        rows = math.lcm(parts, parts * size // math.gcd(parts * size, config.data.length))
    batch = -(-(training.batch // training.accumulation) // rows) * rows
    return dataclasses.replace(training, batch=batch, accumulation=1)


def _meshes(
    count: int, parameters: list[jax.ShapeDtypeStruct], batch: list[jax.ShapeDtypeStruct]
) -> list[tuple[int, configs.Mesh]]:
    """Every mesh of so many devices that divides these arrays evenly, and the bytes of parameters that a device then
    holds; that of the fewest bytes first, and among equal ones that of the largest fsdp, then expert, then tensor."""
    found = []
    for sizes in _factorisations(count):
        mesh = configs.Mesh(**dict(zip(AXES, sizes)))
        try:
            _bytes_on_each(batch, mesh)
            found.append((_bytes_on_each(parameters, mesh), mesh))
        except ValueError:  # an axis of some array can't be divided evenly
            continue
    return sorted(found, key=lambda one: (one[0], -one[1].fsdp, -one[1].expert, -one[1].tensor))


def _factorisations(number: int, parts: int = len(AXES)) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *others) for others in _factorisations(number // first, parts - 1))


def _bytes_on_each(parameters: list[jax.ShapeDtypeStruct], sizes: configs.Mesh) -> int:
    """Bytes that each device holds of arrays whose shardings, over another mesh, say which of its axes divide them.

    Raises `ValueError` where one can't be divided evenly.
    """
    mesh = AbstractMesh(tuple(getattr(sizes, axis) for axis in AXES), AXES)
    return sum(
        math.prod(NamedSharding(mesh, leaf.sharding.spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in parameters
    )


def _log_mesh(sizes: configs.Mesh, count: int, held: int, whole: int) -> None:
    written = ", ".join(f"mesh.{axis}={getattr(sizes, axis)}" for axis in AXES)
    there = jax.device_count()
    some = "" if count == there else f" on {count} of the {there} devices, the most that fit"
    log.info("%s%s: each holds %.1f of the %.1f MB of parameters", written, some, held / 1e6, whole / 1e6)
