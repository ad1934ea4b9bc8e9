import copy
import dataclasses
import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import Config, Data, Model, Training, resolve
from sparse_lm.errors import UserError
from sparse_lm.models import functional
from sparse_lm.serving import Generator, Sampling
from sparse_lm.serving.generate import cached_logits
from sparse_lm.step.loss import packed_context

END = 0
LENGTH = 48
MODELS = {
    "dense": dict(),
    "gather": dict(experts=4, executor="gather"),
    "einsum, grouped queries, gated": dict(experts=4, executor="einsum", kv_heads=2, activation="swiglu"),
    "dense first, every layer": dict(layers=3, experts=4, dense_first=1, expert_every=1, tied_embeddings=False),
    "dense first, every second, one key": dict(layers=5, experts=3, dense_first=1, kv_heads=1, executor="einsum"),
}
SAMPLING = Sampling()
PROMPTS = [[5, 3, 8], [], [1] * 20, [2, 4, 6, 8, 10, 12, 14], [7]]


@functools.cache
def made(name: str):
    """A model, its functions with the routing groups of training, and parameters at random."""
    given = dict(vocabulary=24, width=16, heads=4, ffn_width=24) | MODELS[name]
    model = resolve(Config(model=Model(**given), data=Data(length=LENGTH), training=Training(batch=1))).model
    fns = functional(model)
    random = np.random.default_rng(3)
    shapes = jax.eval_shape(fns.init, jax.random.key(0))
    return model, fns, jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)


@functools.cache
def forward(name: str):
    """ids [L] -> logits [L, V] of the uncached dropless pass that evaluation makes, over one row of LENGTH."""
    _, fns, parameters = made(name)

    @jax.jit
    def run(ids, count):
        at = jnp.arange(LENGTH)[None]
        batch = {"inputs": ids, "segments": (at < count).astype(jnp.int32), "positions": at}
        return fns.apply(parameters, ids, packed_context(batch, math.inf), fns.init_router_state()).logits[0]

    return lambda ids: np.asarray(run(np.array([[*ids] + [END] * (LENGTH - len(ids))]), len(ids)))[: len(ids)]


@functools.cache
def generator(name: str, end: int = END, max_tokens: int = 12, sampling: Sampling = SAMPLING, **options):
    model, fns, parameters = made(name)
    state = fns.init_router_state()
    return Generator(model, parameters, state, end_of_text=end, max_tokens=max_tokens, sampling=sampling, **options)


def greedy_loop(name: str, end: int, prompt: list[int], max_tokens: int) -> list[int]:
    ids = [end, *prompt]
    while len(ids) < 1 + len(prompt) + max_tokens:
        token = int(forward(name)(ids)[-1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[1 + len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_uncached_pass_at_every_position(name):
    model, _, parameters = made(name)
    fns = functional(dataclasses.replace(model, group_size=1))
    ids = np.random.default_rng(0).integers(0, model.vocabulary, (3, 21))
    first = np.array([9, 6, 1], np.int32)  # tokens of each row in the first pass, which is padded to 9
    step = jax.jit(lambda *args: cached_logits(fns, parameters, fns.init_router_state(), *args))
    logits, caches = step(fns.init_caches(3, 25), ids[:, :9], np.zeros(3, np.int32), first)
    found = [list(np.asarray(row)[:count]) for row, count in zip(logits, first)]
    for start in (first + i for i in range(12)):
        logits, caches = step(caches, np.take_along_axis(ids, start[:, None], axis=1), start, np.ones(3, np.int32))
        for row, new in zip(found, logits):
            row.append(np.asarray(new)[0])
    for row, of_row in enumerate(found):
        np.testing.assert_allclose(of_row, forward(name)(ids[row, : len(of_row)]), atol=2e-5)


def test_padding_is_not_valid_and_positions_count_from_the_rows_first_token():
    # Nothing attends to padding, so the logits alone do not show this.
    _, fns, parameters = made("dense")
    seen = []

    def apply(parameters, ids, context, *args, **kwargs):
        seen.append(context)
        return fns.apply(parameters, ids, context, *args, **kwargs)

    recording, lengths, ones = copy.copy(fns), jnp.array([1, 4]), jnp.ones(2, int)
    recording.apply = apply
    caches = fns.init_caches(2, 6)
    caches = cached_logits(recording, parameters, {}, caches, jnp.ones((2, 4), int), 0 * lengths, lengths)[1]
    cached_logits(recording, parameters, {}, caches, jnp.ones((2, 1), int), lengths, ones)
    assert [context.valid.tolist() for context in seen] == [[[True] + [False] * 3, [True] * 4], [[True], [True]]]
    assert [context.positions.tolist() for context in seen] == [[[0, 1, 2, 3], [0, 1, 2, 3]], [[1], [4]]]
    assert [context.capacity_factor for context in seen] == [math.inf] * 2


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_full_pass_over_and_over(name):
    found = generator(name, sampling=Sampling(0.0)).generate(PROMPTS, [0] * len(PROMPTS))
    assert found == [greedy_loop(name, END, prompt, 12) for prompt in PROMPTS]


def test_a_row_is_continued_as_it_is_alone_and_in_another_order():
    g = generator("gather")
    seeds = [4, -1, 2**70 + 5, 3, 3]
    together = g.generate(PROMPTS, seeds)
    assert [g.generate([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds)] == together
    assert g.generate(PROMPTS[::-1], seeds[::-1]) == together[::-1]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


@pytest.mark.parametrize("name", [name for name in MODELS if "experts" in MODELS[name]])
def test_these_models_use_several_experts(name):
    _, fns, parameters = made(name)
    ids = jnp.arange(24).reshape(1, 24)
    batch = {"inputs": ids, "segments": jnp.ones_like(ids), "positions": ids}
    experts = fns.apply(parameters, ids, packed_context(batch, math.inf), fns.init_router_state()).aux.chosen
    assert all(len(np.unique(layer)) > 1 for layer in experts)


def test_the_seed_and_the_prompt_decide():
    g = generator("dense", max_tokens=20)
    a, b, other = g.generate([[5, 3], [5, 3], [5, 3]], [1, 1, 2])
    assert a == b != other
    assert g.generate([[5, 3]], [1]) == [a]


def test_the_next_token_is_drawn_from_the_distribution_of_the_full_pass():
    draws = 2048
    found = generator("gather", max_tokens=1).generate([[5, 3]] * draws, list(range(draws)))
    count = np.bincount([row[0] if row else END for row in found], minlength=24)
    logits = forward("gather")([END, 5, 3])[-1].astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum()
    assert (np.abs(count / draws - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / draws)).all()


def test_a_row_ends_at_end_of_text_and_the_others_go_on():
    # An end_of_text that the greedy continuation of [9] comes to after some tokens, and that of [3] does not.
    for end in range(24):
        ending, going = (greedy_loop("gather", end, prompt, 10) for prompt in ([9], [3]))
        if 0 < len(ending) < 10 and len(going) == 10:
            break
    else:
        raise AssertionError("no such token")
    g = generator("gather", end=end, max_tokens=10, sampling=Sampling(0.0))
    assert list(g.stream([[9], [3]], [0, 0])) == [list(t) for t in zip(ending + [None] * (10 - len(ending)), going)]
    assert list(g.stream([[9]], [0])) == [[token] for token in ending]


def test_a_row_that_has_ended_stays_ended():
    steps = list(generator("dense", max_tokens=40).stream([[1]] * 8, list(range(8))))
    ends = [next((i for i, step in enumerate(steps) if step[row] is None), 40) for row in range(8)]
    assert len({end for end in ends if end < 40}) > 1
    assert all(step[row] is None for row, end in enumerate(ends) for step in steps[end:])
    assert END not in {token for step in steps for token in step}


def test_steps_are_streamed_as_they_are_made():
    g = generator("dense")
    steps = g.stream([[1], [2, 3]], [0, 0])
    first = [next(steps) for _ in range(2)]
    assert first + list(steps) == list(g.stream([[1], [2, 3]], [0, 0]))


def test_prompts_of_like_length_share_one_program():
    g = generator("dense", max_tokens=2)
    for length in (0, 1, 7, 16):
        g.generate([[1] * length] * 3, [0] * 3)
    assert g._prefill._cache_size() == g._step._cache_size() == 1
    g.generate([[1] * 17] * 4, [0] * 4)
    assert g._prefill._cache_size() == g._step._cache_size() == 2


def test_ids_that_the_tokenizer_lacks_are_not_generated():
    g = generator("dense", vocabulary=3, max_tokens=30)
    found = {token for row in g.generate([[]] * 8, list(range(8))) for token in row}
    assert found == {1, 2}


def test_no_prompts_give_no_steps_and_no_tokens_is_a_mistake():
    assert generator("dense").generate([], []) == []
    with pytest.raises(UserError, match="max_tokens is 0; it must be at least 1"):
        generator("dense", max_tokens=0)


MESHES = """
import jax, math
from sparse_lm.config import Config, Data, Mesh, Model, Training, resolve
from sparse_lm.mesh import make_mesh
from sparse_lm.serving import Generator, Sampling
from sparse_lm.step.build import build

model = Model(vocabulary=24, width=16, heads=4, kv_heads=2, ffn_width=24, experts=4, executor="einsum")
found = []
for axes in (dict(data=1), dict(data=1, fsdp=2, expert=2, tensor=2)):
    config = resolve(Config(model=model, data=Data(length=16), mesh=Mesh(**axes), training=Training(batch=8)))
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(axes.values())])
    made = build(config, mesh)
    state = made.init()
    options = dict(end_of_text=0, max_tokens=8, sampling=Sampling(0.8), mesh=mesh)
    g = Generator(config.model, state.parameters, state.router, **options)
    found.append(g.generate([[5, 3, 8], [], [1] * 20], [1, 2, 3]))
    found[-1] += g.generate([[5] * 12], [4])
    assert g._step._cache_size() == 2, g._step._cache_size()
assert found[0] == found[1], found
assert sum(map(len, found[0])) > 12
"""


def test_a_mesh_of_eight_devices_generates_what_one_does():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", MESHES],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "rematerialization" not in result.stderr
