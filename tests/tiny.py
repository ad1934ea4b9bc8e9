"""Models and batches small enough to compare with slow loops."""

from typing import Any

import jax
import numpy as np

from sparse_lm import config as configs
from sparse_lm.mesh import make_mesh
from sparse_lm.step.build import Build, build

DEFAULTS = {
    "model.vocabulary": 64,
    "model.width": 16,
    "model.layers": 2,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.ffn_width": 32,
    "data.length": 16,
    "training.batch": 4,
    "training.steps": 60,
    "optimizer.warmup_steps": 5,
}


def switch(**options) -> configs.Choice:
    """A Switch router without what has an effect even with one expert, unless asked for."""
    return configs.choice("switch", **{"jitter": 0.0, "z_loss": 0.0} | options)


def config(**fields: Any) -> configs.Config:
    """A resolved config: `config(model__experts=4)` sets model.experts."""
    made = configs.Config()
    for path, value in (DEFAULTS | {name.replace("__", "."): value for name, value in fields.items()}).items():
        part, name = path.split(".")
        setattr(getattr(made, part), name, value)
    return configs.resolve(made)


def batch(config: configs.Config, seed: int = 0, padding: tuple[int, ...] = (0, 3, 7, 1), documents: int = 3) -> dict:
    """Random rows of several documents each, row r with padding[r mod …] tokens of padding at its end."""
    rows, length = config.training.batch, config.data.length
    random = np.random.default_rng(seed)
    tokens = random.integers(1, config.model.vocabulary, (rows, length + 1), dtype=np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        used = length - padding[row % len(padding)]
        starts = [0, *sorted(random.choice(np.arange(1, used), documents - 1, replace=False)), used]
        for document, (start, stop) in enumerate(zip(starts, starts[1:])):
            segments[row, start:stop] = document + 1
            positions[row, start:stop] = np.arange(stop - start)
    kept = segments > 0
    return {
        "inputs": np.where(kept, tokens[:, :-1], 0),
        "targets": np.where(kept, tokens[:, 1:], 0),
        "segments": segments,
        "positions": positions,
        "bytes": 3 * kept.sum(axis=1, dtype=np.int32),
    }


_built: dict[str, Build] = {}


def built(**fields: Any) -> Build:
    """The build of `config(**fields)` on one device; the same one for the same fields, so that it compiles once."""
    made = config(**fields)
    key = repr(configs.to_dict(made))
    if key not in _built:
        _built[key] = build(made, make_mesh(made.mesh, jax.devices()[:1]))
    return _built[key]


def dense(parameters: dict) -> dict:
    """The parameters of a model of one expert as those of its dense twin: without routers and axes of experts."""
    if "experts" in parameters:
        squeeze = lambda w: w.squeeze(axis=-3)
        return jax.tree.map(squeeze, parameters["experts"])
    return {k: dense(v) if isinstance(v, dict) else v for k, v in parameters.items()}


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Both trees are equal but for float32 rounding: to a share of the largest entry of each array."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * (np.abs(e).max(initial=0) + 1e-30)),
        actual,
        expected,
    )


def equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
