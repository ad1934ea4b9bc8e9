"""The one wiring file: from a config to a trained run in a folder, and from such a folder back to its parts."""

import contextlib
import dataclasses
import logging
import math
import platform
from importlib import metadata
from typing import Any, NamedTuple

import jax
from etils import epath

from sparse_lm import config as configs
from sparse_lm import data
from sparse_lm.cost.routers import executor, form, skips_layers
from sparse_lm.errors import Stopped, UserError, nearest
from sparse_lm.mesh import make_mesh, sharding
from sparse_lm.routing import leak
from sparse_lm.training.actions import Actions
from sparse_lm.training.anticipation import step_batch
from sparse_lm.training.build import Build, build
from sparse_lm.training.checkpoints import Checkpoints
from sparse_lm.training.clock import Clock
from sparse_lm.training.estimate import seconds_per_step
from sparse_lm.training.loop import Moment, loop
from sparse_lm.training.measures import evaluate as measure
from sparse_lm.training.progress import Progress, duration
from sparse_lm.training.run_folder import RunFolder, read_config, read_info
from sparse_lm.training.snapshot import initial_state, restore, restore_state, saved_run
from sparse_lm.training.stopping import StopSignal
from sparse_lm.training.tensorboard import TensorBoard
from sparse_lm.training.watchdog import Watchdog

log = logging.getLogger("sparse_lm")

PACKAGES = ("sparse_lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def train(config: configs.Config, workdir: str, init_from: str = "") -> dict[str, Any]:
    """Trains a model in a folder, or continues the training that the folder holds; returns the run's summary.

    init_from: RUN or RUN@STEP, another run's folder, whose parameters and tokenizer a new run begins with. Raises
    `UserError` for what does not fit, `RunFailed` after too many skipped steps, `Stopped` where a signal ended the run.
    """
    clock = Clock()
    config, init_from = _begin_from(configs.resolve(config), workdir, init_from)
    with contextlib.ExitStack() as entered:
        enter = entered.enter_context
        signal, watchdog = enter(StopSignal()), enter(Watchdog(config.training.watchdog))
        use_compilation_cache(config)
        program = build(config, make_mesh(config.mesh))
        if config.model.experts and not skips_layers(config.model):
            _log_executor(config.model, program.mesh)
        if ahead := leak(config.model, config.model.capacity_factor, training=True):
            log.info("in training the routing looks ahead: %s", ahead)
        watchdog.beat("preparing the data")
        with clock.phase("data"):
            corpus = data.prepare(config)
        splits, batches = _splits(config, corpus), _batches(config, corpus)
        info = {"fingerprint": corpus.fingerprint, "init_from": init_from, "devices": _devices()}
        primary = jax.process_index() == 0
        folder = enter(RunFolder(workdir, config, {"versions": _versions(), **info}, primary))
        steps = config.training.steps
        if (summary := folder.summary()) and summary["steps"] >= steps:
            log.info("%s is finished: %d steps are done; a higher training.steps goes on", workdir, summary["steps"])
            return summary
        checkpoints = enter(Checkpoints(folder.checkpoints, config.checkpoints.keep))
        watchdog.beat("making or restoring the state")
        with clock.phase("restoring"):
            continued = bool(checkpoints.steps())
            state = restore_state(program, checkpoints) if continued else initial_state(program, init_from)
        start, waited = int(state.step), 0.0
        if start > steps:
            raise UserError(f"{workdir} has {start} steps already; training.steps is {steps}, which is below")
        if continued:
            meta, rows = checkpoints.meta(start), folder.rows("metrics")
            clock.resume(meta["seconds"], max(0.0, rows[-1]["seconds"] - meta["seconds"]["training"]) if rows else 0.0)
            waited = meta["waited"]
            log.info("%s goes on after step %d", workdir, start)
        folder.rewind(start)
        if primary:
            folder.keep(f"tokenizer{epath.Path(config.data.tokenizer).suffix or '.json'}", corpus.tokenizer.file)
        watchdog.beat("compiling the step")
        with clock.phase("compilation"):
            step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
        if signal.number and jax.process_count() == 1:
            raise Stopped(f"{workdir}: stopped before a step was done", signal.exit_code)
        shown = config.logging.progress and primary
        if shown:
            left = duration(seconds_per_step(config) * (steps - start))
            log.info("%s: %d steps, very roughly %s of training", config.name or workdir, steps - start, left)
        progress = enter(contextlib.closing(Progress(config.name or str(workdir), start, steps, shown)))
        place = sharding(program.mesh, "batch")
        ahead = enter(data.Prefetch(lambda i: step_batch(config, batches, i, place), start, steps))
        board = enter(contextlib.closing(TensorBoard(folder.path))) if config.logging.tensorboard and primary else None
        actions = Actions(
            program,
            corpus,
            splits,
            folder,
            checkpoints,
            clock,
            progress,
            ahead,
            board,
            signal,
            watchdog,
            info,
            waited,
            state,
        )
        with clock.phase("training"):
            state = loop(step, state, ahead, start, steps, actions.pairs(), watchdog.beat)
        if actions.evaluated[0] != steps:  # ended between its last checkpoint and its summary
            actions.evaluate(Moment(steps, state, {}, True))
        with clock.phase("checkpoints"):
            checkpoints.wait()
        folder.finish(summary := actions.summary(state))
        if signal.number:
            raise Stopped(f"{workdir}: finished, and stopped as asked", signal.exit_code)
        return summary


def _begin_from(config: configs.Config, workdir: str, init_from: str) -> tuple[configs.Config, str]:
    """The config, and what its run begins from: what is asked for, or what a run that is continued began from.

    The tokenizer is the other run's unless the config names one, since its parameters mean its tokens.
    """
    stored = read_info(workdir)["init_from"] if (epath.Path(workdir) / "config.json").exists() else None
    asked = saved_run(init_from) if init_from else ""
    if stored is not None and asked and asked.rpartition("@")[0] != stored.rpartition("@")[0]:
        raise UserError(f"{workdir} holds a run that began from {stored or 'no other run'}, not from {asked}")
    found = asked if stored is None else stored
    if found and not config.data.tokenizer:
        tokenizer = str(next(epath.Path(found.rpartition("@")[0]).glob("tokenizer.*")))
        config = configs.resolve(
            dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
        )
    return config, found


class Loaded(NamedTuple):
    """A trained model, from the folder of its run."""

    config: configs.Config
    program: Build
    corpus: data.Corpus
    step: int
    parameters: dict
    router: dict


def load(workdir: str, step: int | None = None, capacity_factor: float | None = None) -> Loaded:
    """The model of a run after a step, by default the newest that was saved, on the devices that there are.

    capacity_factor: of the evaluation, in place of the config's; inf drops nothing.
    """
    config = read_config(workdir)
    if capacity_factor is not None:
        if form(config.model) != "token":
            raise UserError(
                f"--capacity-factor is {capacity_factor}; the router {config.model.router.name!r} is evaluated with "
                "the places that it was trained with"
            )
        model = dataclasses.replace(config.model, eval_capacity_factor=capacity_factor)
        config = configs.resolve(dataclasses.replace(config, model=model))
    program = build_here(config)
    config = program.config
    with Checkpoints(f"{workdir}/checkpoints") as checkpoints:
        items = restore(program, checkpoints, step, only=("parameters", "router", "position"))
    corpus = same_corpus(config, workdir)
    return Loaded(config, program, corpus, int(items["position"]["step"]), items["parameters"], items["router"])


def evaluate(workdir: str, step: int | None = None, capacity_factor: float | None = None) -> dict[str, Any]:
    """The measures of a run's saved model on every held-out split of its data, by split, its step, and how the
    routing looks ahead (`routing.leak`); see `load`."""
    loaded = load(workdir, step, capacity_factor)
    splits = [split for split in loaded.corpus.split_names if split != "train"]
    measured = measure(loaded.program, loaded.corpus, loaded.parameters, loaded.router, splits)
    model = loaded.config.model
    return {"step": loaded.step, "evaluation": measured, "leak": leak(model, model.eval_capacity_factor)}


def use_compilation_cache(config: configs.Config) -> None:
    """Keeps compiled programs over processes; the second start of a config compiles nothing."""
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.cache).expanduser() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _batches(config: configs.Config, corpus: data.Corpus) -> data.Batches:
    steps, batch = config.training.steps, config.training.batch
    batches = corpus.train(config.training.seed, batch)
    if len(batches) < steps:
        raise UserError(f"training.steps is {steps}; max_epochs of the sources allows {len(batches)} of {batch} rows")
    return batches


def _splits(config: configs.Config, corpus: data.Corpus) -> list[str]:
    """The splits to evaluate while training. A corpus need not have a held-out domain."""
    wanted = [s for s in config.evaluation.splits if s in corpus.split_names or s != "heldout_domain"]
    for split in wanted:
        if split not in corpus.split_names:
            raise UserError(
                f"evaluation.splits names {split!r}, which the data has not{nearest(split, corpus.split_names)}"
            )
    return wanted


def build_here(config: configs.Config) -> Build:
    """`build` on the mesh of the config where it fits the devices that there are, otherwise on one that does."""
    use_compilation_cache(config)
    try:
        return build(config, make_mesh(config.mesh))
    except UserError:
        training = dataclasses.replace(config.training, accumulation=1)
        config = configs.resolve(dataclasses.replace(config, training=training, mesh=configs.Mesh()))
        groups = training.batch * config.data.length // config.model.group_size
        fitting = math.gcd(training.batch, groups, jax.device_count())
        return build(config, make_mesh(config.mesh, jax.devices()[:fitting]))


def same_corpus(config: configs.Config, workdir: str) -> data.Corpus:
    corpus, stored = data.prepare(config), read_info(workdir)["fingerprint"]
    if corpus.fingerprint != stored:
        raise UserError(
            f"the data of {workdir} has changed: its fingerprint was {stored} and is {corpus.fingerprint} now"
        )
    return corpus


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def _log_executor(model: configs.Model, mesh: jax.sharding.Mesh) -> None:
    factors = (model.capacity_factor, model.eval_capacity_factor)
    training, evaluation = (executor(model, mesh.devices.flat[0].platform, factor) for factor in factors)
    if model.executor == "auto":
        log.info("experts are computed by %s in training, by %s in evaluation", training, evaluation)
    if training == "grouped" and mesh.shape["expert"] > 1 and math.isinf(model.exchange_buffer):
        log.info(
            "each device has room for all rows of the %d that exchange theirs; a model.exchange_buffer of 2, say, "
            "leaves it room for twice an even share",
            mesh.shape["expert"],
        )


def _devices() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }
