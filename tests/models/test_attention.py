import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models.attention import FullAttention, rotate
from sparse_lm.models.context import Context
from tests import tiny
from tests.oracles import decoder

ROWS, LENGTH, D = 2, 7, 16


def attention(heads, kv_heads):
    model = tiny.config(model__heads=heads, model__kv_heads=kv_heads, model__rope_base=50.0).model
    layer = FullAttention(model, nnx.Rngs(params=0))
    weights = {n: np.asarray(getattr(layer, n)[...], np.float64) for n in ("query", "key", "value", "out")}
    return layer, weights


def inputs():
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, LENGTH, D))
    positions = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]])
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(LENGTH, dtype=bool)
    return x, positions, segments, mask


def context(positions, segments, start=None):
    return Context(jnp.zeros_like(positions), jnp.asarray(segments), jnp.asarray(positions), np.inf, start)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (2, 2)])
def test_grouped_query_attention_is_the_loop(heads, kv_heads):
    layer, weights = attention(heads, kv_heads)
    x, positions, segments, mask = inputs()
    found, cache = layer(jnp.asarray(x, jnp.float32), context(positions, segments))
    assert cache is None
    tiny.close(found, decoder.attention(weights, x, positions, mask, 50.0))


def test_a_cache_filled_in_pieces_gives_what_one_pass_gives():
    layer, weights = attention(4, 2)
    x, *_ = inputs()
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    mask = np.tile(np.tri(LENGTH, dtype=bool), (ROWS, 1, 1))
    run, pieces = cached(layer), []
    cache = layer.init_cache(ROWS, 9)
    for start, stop in [(0, 4), (4, 5), (5, 7)]:
        at = positions[:, start:stop]
        y, cache = run(x[:, start:stop].astype(np.float32), at, np.ones_like(at), cache)
        pieces.append(y)
    tiny.close(np.concatenate(pieces, axis=1), decoder.attention(weights, x, positions, mask, 50.0))


def cached(layer):
    """(x, positions, segments, cache) -> (y, cache), each row writing at the place of its first position."""
    graph, state = nnx.split(layer)
    return jax.jit(lambda x, p, s, cache: nnx.merge(graph, state)(x, context(p, s, p[:, 0]), cache))


def test_rows_of_a_cache_begin_where_they_are():
    """Row 0 has 2 tokens before and row 1 has 5; what pads the first pass is seen by nobody, also once overwritten."""
    layer, weights = attention(4, 2)
    x, *_ = inputs()
    run, before = cached(layer), np.array([2, 5])
    index = np.arange(5, dtype=np.int32)
    first = np.where((index < before[:, None])[..., None], x[:, :5], 100.0)
    positions, segments = np.tile(index, (ROWS, 1)), (index < before[:, None]).astype(np.int32)
    _, cache = run(first.astype(np.float32), positions, segments, layer.init_cache(ROWS, 9))
    at = (before[:, None] + np.arange(2)).astype(np.int32)
    y, _ = run(np.take_along_axis(x, at[..., None], axis=1).astype(np.float32), at, np.ones_like(at), cache)
    whole = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    expected = decoder.attention(weights, x, whole, np.tile(np.tri(LENGTH, dtype=bool), (ROWS, 1, 1)), 50.0)
    tiny.close(y, np.take_along_axis(expected, at[..., None], axis=1))


def test_scores_depend_on_the_distance_alone():
    random = np.random.default_rng(0)
    query, key = jnp.asarray(random.normal(size=(2, 1, 1, 1, 8)), jnp.float32)
    score = lambda q, k: (rotate(query, jnp.array([[q]]), 1e4) * rotate(key, jnp.array([[k]]), 1e4)).sum()
    assert float(score(7, 3)) == pytest.approx(float(score(104, 100)), rel=1e-4)
    assert float(score(7, 3)) != pytest.approx(float(score(8, 3)), rel=1e-2)
