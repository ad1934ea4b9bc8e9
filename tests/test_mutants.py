"""Faults that were planted, each of which the quick suite must notice: the tests named here fail once it is there."""

import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]


class Mutant(NamedTuple):
    file: str  # in sparse_lm
    old: str  # stands there once
    new: str
    tests: str  # that notice


MUTANTS = {
    "level of the interval in a verdict": Mutant(
        "scaling/statistics.py",
        "ppf((1 + level) / 2, n - 1))\n    half = quantile",
        "ppf((1 + 0.8) / 2, n - 1))\n    half = quantile",
        "scaling",
    ),
    "dropped share without its denominator": Mutant(
        "routing/health.py",
        '(statistics["dropped"] + beyond) / choices',
        '(statistics["dropped"] + beyond)',
        "routing/test_health.py",
    ),
    "a gated twin counted with two matrices": Mutant(
        "models/feed_forward.py",
        "for parameter in self._named.values())",
        "for parameter in (self.into, self.out))",
        "cost",
    ),
    "the shuffle's seed without the source's number": Mutant(
        "data/corpus.py", "SeedSequence([seed, part])", "SeedSequence([seed])", "data/test_corpus.py"
    ),
    "one dropout key for all devices": Mutant(
        "experts/grouped.py", "jax.random.fold_in(key, device)", "key", "test_mesh.py"
    ),
    "one dropout key for all microbatches": Mutant(
        "step/loss.py",
        "jax.random.split(key, parts)",
        "jnp.broadcast_to(key, (parts, *key.shape))",
        "step/test_build.py",
    ),
    "a router state that moves on a skipped step": Mutant(
        "step/step.py",
        "before = (state.parameters, state.optimizer, state.router)",
        "before = (state.parameters, state.optimizer, after[2])",
        "step/test_build.py",
    ),
    "Muon on the router": Mutant(
        "parameter.py", '"width" in axes and "router_experts" not in axes', '"width" in axes', "step/test_optimizer.py"
    ),
    "the best step is that of the highest loss": Mutant(
        "runs/checkpoints.py", "best = min(steps", "best = max(steps", "runs/test_checkpoints.py"
    ),
    "the last batch of an evaluation is left out": Mutant(
        "data/corpus.py", "-(-len(interleaved) // batch))", "max(1, len(interleaved) // batch))", "data/test_corpus.py"
    ),
    "an exchange buffer in evaluation": Mutant(
        "models/expert_layer.py",
        "math.inf if key is None else model.exchange_buffer",
        "model.exchange_buffer",
        "models/test_layer.py",
    ),
    "places rounded down": Mutant(
        "config.py", "math.ceil(round(factor", "math.floor(round(factor", "routing/test_placement.py"
    ),
    "norms that decay": Mutant(
        "step/optimizer.py",
        'decay = 0.0 if axes[-1] == "norm" else',
        'decay = 0.0 if axes[-1] == "table" else',
        "step/test_optimizer.py",
    ),
    "a token that does not see itself": Mutant(
        "models/attention.py", "return key <= query", "return key < query", "models/test_attention.py"
    ),
    "speedup in FLOPs the other way round": Mutant(
        "scaling/outcome.py",
        "steps * _model_step_flops(base.config) / _model_step_flops(run.config)",
        "steps * _model_step_flops(run.config) / _model_step_flops(base.config)",
        "scaling",
    ),
    "layers of a period numbered by place first": Mutant(
        "stack.py",
        "len(self.prefix) + repeat * len(self.period) + place",
        "len(self.prefix) + place * self.repeats + repeat",
        "test_stack.py",
    ),
    "a digest that does not see where an element stands": Mutant(
        "runs/digest.py", "_mix(bits ^ _mix(place", "_mix(bits ^ _mix(0 * place", "runs/test_digest.py"
    ),
    "a bias that is part of the weights": Mutant(
        "routing/deepseek.py",
        "gather_chosen(scores, expert)",
        'gather_chosen(scores + state["bias"], expert)',
        "routing/test_deepseek.py",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_noticed(name, tmp_path):
    mutant = MUTANTS[name]
    for folder in ("sparse_lm", "tests", "configs", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("pytest.ini", "setup.py", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tmp_path)
    path = tmp_path / "sparse_lm" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1
    path.write_text(text.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutant.tests}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:]  # 1: some test failed
