import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models.attention import Attention, Cache, rotate
from tests import tiny
from tests.oracles import decoder

ROWS, LENGTH, D = 2, 7, 16


def attention(heads, kv_heads):
    model = tiny.config(model__heads=heads, model__kv_heads=kv_heads, model__rope_base=50.0).model
    layer = Attention(model, nnx.Rngs(params=0))
    weights = {n: np.asarray(getattr(layer, n)[...], np.float64) for n in ("query", "key", "value", "out")}
    return layer, weights


def inputs():
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, LENGTH, D))
    positions = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2, 2]])
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(LENGTH, dtype=bool)
    return x, positions, mask


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (2, 2)])
def test_grouped_query_attention_is_the_loop(heads, kv_heads):
    layer, weights = attention(heads, kv_heads)
    x, positions, mask = inputs()
    found, cache = layer(jnp.asarray(x, jnp.float32), jnp.asarray(positions), jnp.asarray(mask))
    assert cache is None
    tiny.close(found, decoder.attention(weights, x, positions, mask, 50.0))


def test_a_cache_filled_in_pieces_gives_what_one_pass_gives():
    layer, weights = attention(4, 2)
    x, _, _ = inputs()
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    mask = np.tile(np.tri(LENGTH, 9, dtype=bool), (ROWS, 1, 1))
    cache = Cache(*[jnp.zeros((ROWS, 9, 2, 4))] * 2)
    graph, state = nnx.split(layer)
    run = jax.jit(lambda x, p, m, cache, start: nnx.merge(graph, state)(x, p, m, (cache, start)))
    pieces = []
    for start, stop in [(0, 4), (4, 5), (5, 7)]:
        part = slice(start, stop)
        y, cache = run(x[:, part].astype(np.float32), positions[:, part], mask[:, part], cache, jnp.int32(start))
        pieces.append(y)
    tiny.close(np.concatenate(pieces, axis=1), decoder.attention(weights, x, positions, mask[..., :LENGTH], 50.0))


def test_scores_depend_on_the_distance_alone():
    random = np.random.default_rng(0)
    query, key = jnp.asarray(random.normal(size=(2, 1, 1, 1, 8)), jnp.float32)
    score = lambda q, k: (rotate(query, jnp.array([[q]]), 1e4) * rotate(key, jnp.array([[k]]), 1e4)).sum()
    assert float(score(7, 3)) == pytest.approx(float(score(104, 100)), rel=1e-4)
    assert float(score(7, 3)) != pytest.approx(float(score(8, 3)), rel=1e-2)
