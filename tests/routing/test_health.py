import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.routing import TokenChoice
from sparse_lm.routing.health import health, measure

E = 4
measured = jax.jit(
    lambda logits, expert: measure(
        logits, TokenChoice(expert, jnp.ones(expert.shape)), (expert >= 0).any(axis=-1), "batch"
    )
)
health = jax.jit(health)


def figures(expert, logits=None, dropped=0.0):
    logits = np.zeros((*expert.shape[:2], E)) if logits is None else logits
    statistics = measured(logits.astype(np.float32), expert) | {"dropped": np.float32(dropped)}
    return {name: np.asarray(value) for name, value in health(statistics).items()}


def row(*experts):
    return np.array(experts)[None, :, None]


def test_an_even_load():
    found = figures(row(0, 1, 2, 3, 3, 2, 1, 0))
    assert found["load_max"] == 1
    assert found["load_cv"] == 0
    assert found["dead_experts"] == 0
    assert found["dropped"] == 0


def test_every_token_to_one_expert():
    found = figures(row(*[2] * 12), dropped=9)
    assert found["load_max"] == 4
    assert found["load_cv"] == pytest.approx(3**0.5)  # loads 4, 0, 0, 0 of a mean of 1
    assert found["dead_experts"] == 0.75
    assert found["dropped"] == 0.75


def test_half_of_the_experts_are_dead():
    found = figures(row(0, 0, 1, 1))
    assert (found["load_max"], found["load_cv"], found["dead_experts"]) == (2, 1, 0.5)


@pytest.mark.parametrize("tokens, dead", [(1, 0.25), (5, 0.0)])
def test_an_expert_is_dead_under_a_hundredth_of_a_fair_load(tokens, dead):
    """Of 1604 tokens a fair load is 401, and a hundredth of it 4.01."""
    rest = np.arange(1604 - tokens) % 3
    assert figures(row(*[3] * tokens, *rest))["dead_experts"] == dead


@pytest.mark.parametrize(
    "logits, entropy, top, rms",
    [
        ([0, 0, 0, 0], 1.0, 0.25, 0.0),
        ([7, 7, 7, 7], 1.0, 0.25, 7.0),
        ([1000, 0, 0, 0], 0.0, 1.0, 500.0),
        ([50, 50, -50, -50], 0.5, 0.5, 50.0),
    ],
)
def test_entropy_top_probability_and_size_of_the_logits(logits, entropy, top, rms):
    found = figures(row(0, 0), np.tile(np.array(logits, float), (1, 2, 1)))
    assert found["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert found["top_probability"] == pytest.approx(top)
    assert found["logit_rms"] == pytest.approx(rms)


def test_one_expert_is_in_perfect_health():
    found = figures(np.zeros((1, 5, 1), int), np.full((1, 5, 1), 3.0))
    expected = {"load_max": 1, "load_cv": 0, "dead_experts": 0, "dropped": 0, "entropy": 1, "logit_rms": 3}
    assert {name: float(found[name]) for name in expected} == expected


def test_tokens_without_an_expert_are_not_measured():
    random = np.random.default_rng(0)
    logits = random.normal(size=(1, 6, E))
    expert = row(0, 1, 2, 3, 0, 0)
    without = figures(expert[:, :4], logits[:, :4])
    expert[:, 4:], logits[:, 4:] = -1, [[1e6, -1e6, 0, 0]]
    padded = figures(expert, logits)
    assert without == padded


def test_figures_of_a_whole_are_those_of_summed_parts_and_of_stacked_layers():
    random = np.random.default_rng(1)
    expert, logits = random.integers(0, E, (2, 8, 2)), random.normal(size=(2, 8, E))
    logits = logits.astype(np.float32)
    parts = [measured(logits[g : g + 1], expert[g : g + 1]) | {"dropped": np.float32(g)} for g in range(2)]
    summed = health({name: parts[0][name] + parts[1][name] for name in parts[0]})
    whole = figures(expert, logits, dropped=1)
    stacked = health({name: jnp.stack([parts[0][name], parts[1][name]]) for name in parts[0]})
    for name, value in whole.items():
        np.testing.assert_allclose(summed[name], value, rtol=1e-6)
        np.testing.assert_allclose(stacked[name], [health(part)[name] for part in parts], rtol=1e-6)


def test_a_batch_without_tokens_has_finite_figures():
    assert all(np.isfinite(value) for value in figures(row(-1, -1)).values())
