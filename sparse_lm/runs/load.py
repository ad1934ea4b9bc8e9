"""From a run's folder back to its parts: the trained model, and its measures on held-out text."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from sparse_lm import config as configs
from sparse_lm import data
from sparse_lm.errors import UserError
from sparse_lm.routing import TokenChoice, leak, router_of
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.devices import build_here
from sparse_lm.runs.folder import read_config
from sparse_lm.runs.measures import evaluate_rows, final_rows, summarize_rows
from sparse_lm.runs.snapshot import restore
from sparse_lm.runs.text import load_tokenizer, prepare_other, prepare_own
from sparse_lm.step.build import Build


class Loaded(NamedTuple):
    """A trained model, from the folder of its run."""

    config: configs.Config  # the run's, with the capacity factor that was asked for
    program: Build  # on the devices that there are; its own config has their mesh, and a batch that it divides
    tokenizer: data.Tokenizer
    step: int
    parameters: dict
    router: dict


def load(
    path: epath.PathLike,
    step: int | None = None,
    mesh: configs.Mesh | None = None,
    capacity_factor: float | None = None,
) -> Loaded:
    """The model of a run. It needs the run's folder alone, neither the text nor the devices of its training.

    Args:
        path: the run's folder.
        step: after which it was saved; by default the newest.
        mesh: sizes over all devices; by default those of the run where they fit, otherwise such that the parameters are
            divided over the devices (`devices.build_here`).
        capacity_factor: of the evaluation, in place of the config's; inf drops nothing.

    Raises `UserError` for what is not there, can't be read or does not fit.
    """
    config = _read(path, capacity_factor)
    program = build_here(config, mesh)
    with Checkpoints(f"{path}/checkpoints") as checkpoints:
        items = restore(program, checkpoints, step, only=("parameters", "router", "position"))
    reached = int(items["position"]["step"])
    return Loaded(config, program, load_tokenizer(path), reached, items["parameters"], items["router"])


def evaluate(
    path: epath.PathLike,
    step: int | None = None,
    capacity_factor: float | None = None,
    mesh: configs.Mesh | None = None,
    sources: Sequence[str] = (),
) -> dict[str, Any]:
    """The measures of a run's saved model on held-out text.

    Args:
        path, step, capacity_factor, mesh: as `load` takes them.
        sources: other text, written as `config.data.sources`; by default that of the run, which must be what it was.

    Returns `step`, the `sources`, an `evaluation` of every split but the training rows (`measures.summarize_rows`),
    and how the routing looks ahead (`leak`, see `routing.leak`).

    Raises `UserError` as `load` does, and for text that is not there or has changed.
    """
    config = _read(path, capacity_factor)
    if sources:
        corpus = prepare_other(config, path, tuple(sources))
    else:
        corpus = prepare_own(config, path, "bring it back, or evaluate on other text with --sources")
    loaded = load(path, step, mesh, capacity_factor)
    splits = [split for split in corpus.split_names if split != "train"]
    count = final_rows(config.evaluation)
    evaluated = evaluate_rows(loaded.program, corpus, loaded.parameters, loaded.router, splits, count)
    return {
        "step": loaded.step,
        "sources": list(sources or config.data.sources),
        "evaluation": summarize_rows(config.model, evaluated),
        "leak": leak(config.model, config.model.eval_capacity_factor),
    }


def _read(path: epath.PathLike, capacity_factor: float | None) -> configs.Config:
    config = read_config(path)
    if capacity_factor is None:
        return config
    if config.model.experts and router_of(config.model).form is not TokenChoice:
        raise UserError(
            f"--capacity-factor is {capacity_factor}; the router {config.model.router.name!r} is evaluated with "
            "the places that it was trained with"
        )
    model = dataclasses.replace(config.model, eval_capacity_factor=capacity_factor)
    return configs.resolve(dataclasses.replace(config, model=model))
