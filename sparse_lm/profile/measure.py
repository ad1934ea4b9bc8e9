"""Runs a few training steps of a config and measures the time of each part of the model."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm import config as configs
from sparse_lm.cost import count_flops, optimizer_flops
from sparse_lm.cost.machine import Machine, find_machine
from sparse_lm.errors import UserError
from sparse_lm.mesh import make_mesh
from sparse_lm.paths import user_path
from sparse_lm.profile import program, timeline
from sparse_lm.profile.program import PARTS, REST, Scope
from sparse_lm.step.build import Build, build

# The profile's part for a part of `count_flops`, where the names differ.
PART_OF_FLOPS = {
    "attention projections": "attention",
    "attention scores": "attention",
    "feed-forward": "feed_forward",
    "shared experts": "feed_forward",
}


@dataclass(frozen=True)
class Row:
    """One part of a step, on one device."""

    part: str
    forward: float  # seconds
    backward: float  # seconds
    flops: float  # of matrix products; all FLOPs of the optimizer
    bytes: float  # read and written, as if nothing were cached

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Profile:
    """The time of a step by part.

    Attributes:
        rows: the parts.
        idle: seconds of a step in which no instruction runs.
        step: seconds of a step without the profiler, the sum of the rows and `idle`.
        profiled: seconds of a step with the profiler.
        steps: how many were profiled.
        devices: how many ran them.
        machine: peaks of one device.
        dtype: of the products.
    """

    rows: tuple[Row, ...]
    idle: float
    step: float
    profiled: float
    steps: int
    devices: int
    machine: Machine
    dtype: str

    def roofline(self, row: Row) -> float:
        """Computes the least seconds of a part at the machine's peaks."""
        return max(row.flops / self.machine.peak_flops(self.dtype), row.bytes / self.machine.bandwidth)


def profile_steps(config: configs.Config, steps: int = 5, trace: str = "") -> Profile:
    """Profiles training steps on random tokens, on all devices of this process.

    Args:
        config: resolved.
        steps: how many to profile.
        trace: a folder to keep the trace in, for TensorBoard's profiler or Perfetto; "": none is kept.

    Raises:
        UserError: for less than 1 step, a trace folder that is a file, or a config that `build` refuses.
    """
    if steps < 1:
        raise UserError(f"--steps is {steps}; at least 1 step has to be profiled")
    trace = trace and str(user_path(trace))
    folder = Path(trace)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"--trace is {trace}, but {parent} is a file; it has to be a folder, made where there is none")
    built = build(config, make_mesh(config.mesh))
    compiled = built.step.lower(built.abstract_state, built.abstract_batch).compile()
    step = _make_step(built, compiled)
    time_steps = lambda: [step() for _ in range(steps)]
    time_steps()  # the first steps are slower
    plain = time_steps()
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(trace or scratch, profiler_options=_profiler_options()):
            profiled = time_steps()
        spent = timeline.read_trace(trace or scratch)
    plain += time_steps()  # before and after, so that a machine that slows down affects both alike
    device, devices = built.mesh.devices.flat[0], built.mesh.size
    peaks = find_machine(device.device_kind) or measure_machine(devices if device.platform == "cpu" else 1)
    return _summarize(
        config, device.platform, program.read_program(compiled.as_text()), spent, plain, profiled, devices, peaks
    )


def _profiler_options() -> jax.profiler.ProfileOptions:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls are not needed, and slow the step down
    return options


def _make_step(built: Build, compiled: Callable) -> Callable[[], float]:
    """Makes a function that runs the next step and returns its seconds."""
    batch, state = random_batch(built), built.init()

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return step


def random_batch(built: Build) -> dict[str, Any]:
    """Makes the batch of a step: full rows of random tokens, one document each."""
    config = built.config
    rows, length = config.training.batch, config.data.length
    ids = np.random.default_rng(config.training.seed).integers(0, config.model.vocabulary, (rows, length + 1))
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.ones((rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "bytes": np.full(rows, length),
    }
    placed = {k: jax.device_put(v.astype(np.int32), built.abstract_batch[k].sharding) for k, v in batch.items()}
    return {name: placed.get(name, placed) for name in built.abstract_batch}  # the entry `AHEAD` is a batch too


def measure_machine(devices: int) -> Machine:
    """Measures this machine: FLOP/s of a float32 product of 1,024 × 1,024 matrices, and bytes/s of updating 256 MB in
    place (fresh memory would be slow, since the system clears it). The best of several runs counts.

    Args:
        devices: how many share the machine; the peaks are divided by it.
    """
    square, large = jnp.ones((1024, 1024)), jnp.ones(2**26)
    size = large.nbytes
    product = 2 * 1024**3 / _shortest_run(jax.jit(lambda x: x @ x / 1024, donate_argnums=0), square, 50)
    copy = 2 * size / _shortest_run(jax.jit(lambda x: -x, donate_argnums=0), large, 10)
    return Machine("this machine", product / devices, product / devices, copy / devices, "measured")


def _shortest_run(function: Callable, value: jax.Array, rounds: int) -> float:
    """Returns the least seconds of a run of `function` on its last result."""
    seconds = []
    for _ in range(rounds + 1):  # the first compiles
        start = time.perf_counter()
        value = jax.block_until_ready(function(value))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _summarize(
    config: configs.Config,
    platform: str,
    compiled: program.Program,
    spent: list[dict[str, float]],
    plain: list[float],
    profiled: list[float],
    devices: int,
    peaks: Machine,
) -> Profile:
    """Applies the parts' shares of the profiled time to a step without the profiler, which slows all parts down."""
    step = statistics.median(plain)
    busy = max((sum(device.values()) for device in spent), default=0.0)
    scale = step / max(sum(profiled) * 1e9, busy) / max(len(spent), 1)
    seconds: dict[Scope, float] = defaultdict(float)
    for device in spent:
        for name, nanoseconds in device.items():
            seconds[compiled.scopes.get(name, Scope(REST, False))] += nanoseconds * scale
    count = flops_by_part(config, platform)
    rows = tuple(
        Row(
            part,
            seconds[Scope(part, False)],
            seconds[Scope(part, True)],
            count[part] / devices,
            sum(moved for scope, moved in compiled.bytes.items() if scope.part == part),
        )
        for part in (*PARTS, REST)
    )
    idle = step - sum(row.seconds for row in rows)
    return Profile(rows, idle, step, statistics.median(profiled), len(profiled), devices, peaks, config.model.dtype)


def flops_by_part(config: configs.Config, platform: str = "cpu") -> dict[str, float]:
    """Counts the FLOPs of a step on all devices by part, without work per element, which bytes bound."""
    tokens = config.training.batch * config.data.length
    count: dict[str, float] = defaultdict(float)
    for part in count_flops(config.model, config.data.length, platform).parts:
        count[PART_OF_FLOPS.get(part.name, part.name)] += tokens * part.training
    count["optimizer"] = optimizer_flops(config)
    return count
