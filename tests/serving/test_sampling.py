import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.errors import UserError
from sparse_lm.serving.sampling import Sampling, log_probabilities, sample


def slow(logits, temperature, top_k, top_p):
    """Probabilities of one row by a loop over the tokens in the order of their probability, in float64."""
    weights = [float(np.exp((x - max(logits)) / temperature)) for x in np.asarray(logits, np.float64)]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: top_k or None]
    total, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if before / total >= top_p:
            break
        kept.append(token)
        before += weights[token]
    found = np.zeros(len(weights))
    for token in kept:
        found[token] = weights[token] / sum(weights[other] for other in kept)
    return found


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_keeps_the_tokens_of_the_slow_reference_with_their_probabilities(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(6, 33), scale=2).astype(np.float32)
    logits[0, :20] = logits[0, 0]  # equals
    found = np.exp(log_probabilities(jnp.asarray(logits), Sampling(temperature, top_k, top_p)))
    wanted = np.array([slow(row, temperature, top_k, top_p) for row in logits])
    assert ((found > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-8, 8), min_size=7, max_size=7),
    st.sampled_from([0.5, 1.0]),
    st.integers(0, 8),
    st.sampled_from([0.123, 0.456, 0.789, 1.0]),
)
def test_agrees_with_the_slow_reference_on_logits_with_many_equals(logits, temperature, top_k, top_p):
    wanted = slow(logits, temperature, top_k, top_p)
    found = np.exp(log_probabilities(jnp.asarray(logits, jnp.float32), Sampling(temperature, top_k, top_p)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.5, 6, 0.8)])
def test_tokens_come_as_often_as_their_probability_says(sampling):
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32)
    draws = 40_000
    drawn = sample(jnp.tile(logits, (draws, 1)), jax.random.split(jax.random.key(0), draws), sampling)
    wanted = slow(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    found = np.bincount(drawn, minlength=12) / draws
    assert (found[wanted == 0] == 0).all()
    assert (np.abs(found - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / draws)).all()


def test_temperature_0_takes_the_most_probable_whatever_the_rest():
    logits = jnp.array([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 4.0]])
    for sampling in (Sampling(0.0), Sampling(0.0, 3, 0.9)):
        assert sample(logits, jax.random.split(jax.random.key(0), 2), sampling).tolist() == [1, 0]


def test_a_row_is_drawn_with_its_own_key():
    logits = jax.random.normal(jax.random.key(1), (5, 100))
    keys = jax.random.split(jax.random.key(2), 5)
    whole = sample(logits, keys, Sampling())
    alone = [sample(logits[i : i + 1], keys[i : i + 1], Sampling())[0] for i in range(5)]
    assert whole.tolist() == alone
    assert whole.tolist() != sample(logits, keys[::-1], Sampling()).tolist()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_values_out_of_range_are_named(values, words):
    with pytest.raises(UserError, match=words):
        Sampling(**values)
