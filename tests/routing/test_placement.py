import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_lm import config as configs
from sparse_lm.routing import TokenChoice, place
from sparse_lm.routing.placement import rank
from tests.oracles import moe

placed = jax.jit(place, static_argnums=(1, 2))


def choose(expert: np.ndarray, priority: np.ndarray | None = None) -> TokenChoice:
    return TokenChoice(jnp.asarray(expert, jnp.int32), jnp.ones(expert.shape, jnp.float32), priority)


# One shape for each number of choices, so that hypothesis does not compile anew.
choices = st.sampled_from([1, 2]).flatmap(lambda k: arrays(np.int32, (2, 9, k), elements=st.integers(-1, 3)))
priorities = st.none() | arrays(np.float32, (2, 9), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))  # with ties


@settings(max_examples=60, deadline=None)
@given(choices, st.sampled_from([1, 3, 9]), priorities)
def test_places_are_given_in_order_until_they_are_taken(expert, capacity, priority):
    position, kept = placed(choose(expert, priority), 4, capacity)
    for g in range(len(expert)):
        np.testing.assert_array_equal(
            kept[g], moe.place(expert[g], capacity, None if priority is None else priority[g])
        )


@settings(max_examples=60, deadline=None)
@given(choices, st.sampled_from([1, 3, 9]), priorities)
def test_nobody_shares_a_place_and_no_expert_has_more_than_its_capacity(expert, capacity, priority):
    position, kept = map(np.asarray, placed(choose(expert, priority), 4, capacity))
    assert not kept[expert < 0].any()
    assert ((0 <= position) & (position < capacity))[kept].all()
    for g in range(len(expert)):
        held = list(zip(expert[g][kept[g]], position[g][kept[g]]))
        assert len(held) == len(set(held))
        for e in range(4):
            # No place stays empty while a choice of its expert goes without.
            assert (kept[g] & (expert[g] == e)).sum() == min(capacity, (expert[g] == e).sum())


def test_the_last_tokens_lose_their_places():
    _, kept = placed(choose(np.zeros((1, 9, 1))), 4, 3)
    assert kept[0, :, 0].tolist() == [True] * 3 + [False] * 6


def test_a_second_choice_waits_for_every_first_one():
    expert = np.array([[[1, 0], [2, 0], [0, 3], [0, 3]]])
    _, kept = place(choose(expert), 4, 2)
    assert kept[0].tolist() == [[True, False], [True, False], [True, True], [True, True]]


def test_the_highest_priority_goes_first_among_choices_of_a_rank():
    expert = np.array([[[0, 1], [0, 1], [0, 1], [1, 0]]])
    _, kept = place(choose(expert, np.array([[0.5, 0.9, 0.7, 0.1]], np.float32)), 4, 2)
    assert kept[0].tolist() == [[False, False], [True, True], [True, False], [True, False]]


def test_groups_do_not_compete():
    both = np.zeros((2, 9, 1))
    _, kept = placed(choose(both), 4, 3)
    assert kept.sum(axis=1).tolist() == [[3], [3]]


def test_nobody_takes_no_place():
    expert = np.array([[[-1], [0], [-1], [0]]])
    position, kept = place(choose(expert), 4, 2)
    assert kept[0, :, 0].tolist() == [False, True, False, True]
    assert position[0, [1, 3], 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    "tokens, experts, top_k, factor, places",
    [
        (16, 4, 1, 1.0, 4),
        (16, 4, 1, 1.25, 5),
        (16, 4, 2, 1.0, 8),
        (17, 4, 1, 1.0, 5),  # an even routing of 17 tokens needs 5 somewhere
        (16, 3, 1, 1.0, 6),
        (16, 4, 1, 8.0, 16),  # never more than there are tokens
        (16, 64, 1, 1.0, 1),
        (16, 4, 1, 0.01, 1),
        (16, 1, 1, 1.0, 16),
        (16, 4, 1, float("inf"), 16),
        (30, 3, 1, 1.1, 11),  # 1.1 · 10 is 11.000000000000002 in binary
    ],
)
def test_capacity_is_an_even_share_times_the_factor_rounded_up(tokens, experts, top_k, factor, places):
    assert configs.compute_capacity(tokens, experts, top_k, factor) == places


def test_more_choices_than_can_be_numbered_are_refused():
    ranked = lambda experts: jax.eval_shape(lambda e: rank(e, experts), jax.ShapeDtypeStruct((1, 2**20), jnp.int32))
    assert ranked(2**12 - 1).shape == (1, 2**20)
    with pytest.raises(ValueError, match="1048576 choices among 4096 experts are too many"):
        ranked(2**12)
