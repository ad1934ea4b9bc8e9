"""The one wiring file: from a config to a trained run in a folder."""

import contextlib
import logging
import math
import platform
from importlib import metadata
from typing import Any

import jax
from etils import epath

from sparse_lm import __version__, data
from sparse_lm import config as configs
from sparse_lm.errors import Stopped, UserError, suggest
from sparse_lm.experts.auto import executor_name
from sparse_lm.mesh import make_mesh, sharding
from sparse_lm.routing import leak, router_of
from sparse_lm.runs.actions import CheckFinite, Evaluate, Leave, Measure, Rows, Save, check_owner, summarize
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.clock import Clock
from sparse_lm.runs.devices import use_compilation_cache
from sparse_lm.runs.estimate import seconds_per_step
from sparse_lm.runs.folder import RunFolder
from sparse_lm.runs.loop import Moment, loop
from sparse_lm.runs.measures import evaluate_rows, final_rows
from sparse_lm.runs.parent import find_parent, initial_state
from sparse_lm.runs.processes import ask_primary, exchange, together
from sparse_lm.runs.progress import Progress, duration
from sparse_lm.runs.sinks import TensorBoard
from sparse_lm.runs.snapshot import restore_state
from sparse_lm.runs.stopping import StopSignal
from sparse_lm.runs.text import choose_tokenizer, keep_tokenizer, with_tokenizer
from sparse_lm.runs.watchdog import Watchdog
from sparse_lm.step.anticipation import step_batch
from sparse_lm.step.build import build

log = logging.getLogger("sparse_lm")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def train(config: configs.Config, workdir: epath.PathLike, init_from: str = "") -> dict[str, Any]:
    """Trains a model in a folder, or continues the training that the folder holds.

    Args:
        config: need not be resolved.
        workdir: the run's folder, made where it does not exist.
        init_from: RUN or RUN@STEP, another run's folder, whose parameters and tokenizer a new run begins with.

    Returns the run's summary. Raises `UserError` for what does not fit, `RunFailed` after too many skipped steps and
    where another process has taken the folder over, `Stopped` where a signal ended the run.
    """
    watchdog = Watchdog(config.training.watchdog)
    clock = Clock(watchdog.beat)
    config = configs.resolve(config)
    with contextlib.ExitStack() as entered:
        enter = entered.enter_context
        signal, _ = enter(StopSignal()), enter(watchdog)
        parent = find_parent(workdir, init_from)
        tokenizer = choose_tokenizer(config, workdir, parent.path)
        use_compilation_cache(config)
        program = build(config, make_mesh(config.mesh))
        _log_routing(config.model, program.mesh)
        with clock.phase("data", "preparing the data"), signal.at_once("preparing the data"):
            corpus = data.prepare(with_tokenizer(config, tokenizer))
        splits, batches = _splits(config, corpus), _batches(config, corpus)
        info = {
            "fingerprint": corpus.fingerprint,
            "init_from": parent.run,
            "init_from_digest": parent.digest,
            "devices": _devices(),
        }
        primary = jax.process_index() == 0

        def while_waiting() -> None:
            watchdog.beat(f"waiting whether the process that held {workdir} lives")
            if signal.number:
                raise Stopped(f"{workdir}: stopped before a step was done", signal.exit_code)

        with together(f"{workdir} is opened"):
            folder = enter(RunFolder(workdir, config, {"versions": _versions(), **info}, primary, while_waiting))
        steps = config.training.steps
        if (summary := ask_primary("summary", folder.summary)) and summary["steps"] >= steps:
            log.info("%s is finished: %d steps are done; a higher training.steps goes on", workdir, summary["steps"])
            return summary
        checkpoints = enter(Checkpoints(folder.checkpoints, config.checkpoints.keep, lost=lambda: folder.lost))
        with clock.phase("restoring", "making or restoring the state"):
            continued = ask_primary("continued", lambda: bool(checkpoints.steps()))
            state = restore_state(program, checkpoints) if continued else initial_state(program, parent)
        start = int(state.step)
        if start > steps:
            raise UserError(f"{workdir} has {start} steps already; training.steps is {steps}, which is below")
        waited = _resume(checkpoints, folder, clock, start) if continued else 0.0
        check_owner(folder)
        folder.rewind(start)
        keep_tokenizer(folder, corpus.tokenizer, tokenizer)
        with clock.phase("compilation", "compiling the step"):
            step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
            exchange("compiled", None)  # one may have found it compiled; on CPUs a step waits 30 s for its peers
        if signal.number and jax.process_count() == 1:
            raise Stopped(f"{workdir}: stopped before a step was done", signal.exit_code)
        shown = config.logging.progress and primary
        if shown:
            left = duration(seconds_per_step(config) * (steps - start))
            log.info("%s: %d steps, very roughly %s of training", config.name or workdir, steps - start, left)
        progress = enter(contextlib.closing(Progress(config.name or str(workdir), start, steps, shown)))
        place = sharding(program.mesh, "batch")
        ahead = enter(data.Prefetch(lambda i: step_batch(config, batches, i, place), start, steps))
        ahead.wait_seconds += waited
        board = enter(contextlib.closing(TensorBoard(folder.path))) if config.logging.tensorboard and primary else None
        rows = Rows(folder=folder, board=board)
        measure = Measure(
            stack=program.functional.stack, rows=rows, clock=clock, batches=ahead, progress=progress, start=state
        )
        evaluate = Evaluate(program=program, corpus=corpus, splits=splits, rows=rows, clock=clock, start=start)
        save = Save(
            program=program, folder=folder, checkpoints=checkpoints, clock=clock, batches=ahead, evaluation=evaluate
        )
        # Several processes have to ask about a signal at the same steps, and asking costs them a message.
        ask, most = 1 if jax.process_count() == 1 else config.logging.every, config.training.max_skipped
        actions = [
            (1, lambda moment: check_owner(folder)),
            (config.logging.every, measure),
            (min(config.logging.every, most), CheckFinite(path=folder.path, limit=most)),
            (config.evaluation.every, evaluate),
            (config.checkpoints.every or steps, save),
            (ask, Leave(path=folder.path, steps=steps, signal=signal, save=save)),
        ]
        with clock.phase("training"):
            state = loop(step, state, ahead, start, steps, actions, watchdog.beat)
        if evaluate.step != steps:  # ended between its last checkpoint and its summary
            evaluate(Moment(steps, state, {}, True))
        with clock.phase("checkpoints"):
            checkpoints.wait()
        with clock.phase("evaluation", "the evaluation that ends the run"):
            count = final_rows(config.evaluation)
            evaluated = evaluate_rows(program, corpus, state.parameters, state.router, splits, count)
        summary = summarize(config, state, clock, ahead.wait_seconds, evaluated) | info
        with together(f"{workdir} is finished"):  # so that no process reads the folder before it is
            check_owner(folder)
            folder.finish(summary, evaluated)
        if signal.number:
            raise Stopped(f"{workdir}: finished, and stopped as asked", signal.exit_code)
        return summary


def _resume(checkpoints: Checkpoints, folder: RunFolder, clock: Clock, step: int) -> float:
    """Lets the clock count on from a checkpoint; returns the seconds that the run has waited for data."""
    meta, rows = checkpoints.meta(step), folder.rows("metrics") if folder.primary else []
    clock.resume(meta["seconds"], max(0.0, rows[-1]["seconds"] - meta["seconds"]["training"]) if rows else 0.0)
    log.info("%s goes on after step %d", folder.path, step)
    return meta["waited"]


def _batches(config: configs.Config, corpus: data.Corpus) -> data.Batches:
    steps, batch = config.training.steps, config.training.batch
    batches = corpus.training_batches(config.training.seed, batch)
    if len(batches) < steps:
        raise UserError(f"training.steps is {steps}; max_epochs of the sources allows {len(batches)} of {batch} rows")
    return batches


def _splits(config: configs.Config, corpus: data.Corpus) -> list[str]:
    """The splits to evaluate while training. A corpus need not have a held-out domain."""
    wanted = [s for s in config.evaluation.splits if s in corpus.split_names or s != "heldout_domain"]
    for split in wanted:
        if split not in corpus.split_names:
            raise UserError(
                f"evaluation.splits names {split!r}, which the data has not{suggest(split, corpus.split_names)}"
            )
    return wanted


def _versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "sparse_lm": __version__}
    return own | {name: metadata.version(name) for name in PACKAGES}


def _log_routing(model: configs.Model, mesh: jax.sharding.Mesh) -> None:
    if model.experts and not router_of(model).skips_layers:
        _log_executor(model, mesh)
    if ahead := leak(model, model.capacity_factor, training=True):
        log.info("in training the routing looks ahead: %s", ahead)


def _log_executor(model: configs.Model, mesh: jax.sharding.Mesh) -> None:
    factors = (model.capacity_factor, model.eval_capacity_factor)
    form, platform = router_of(model).form, mesh.devices.flat[0].platform
    training, evaluation = (executor_name(model, form, platform, factor) for factor in factors)
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
