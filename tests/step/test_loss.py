import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models import attention, functional
from sparse_lm.step.loss import loss, packed_context, token_losses
from tests import tiny

SPARSE = {"model__experts": 4, "model__router": tiny.switch(jitter=0.1, z_loss=0.01, balance_loss=0.1)}
CONFIG = tiny.config(**SPARSE)


@functools.cache
def losses():
    fns = functional(CONFIG.model)
    parameters = jax.jit(fns.init)(jax.random.key(0))
    run = jax.jit(lambda batch, key: loss(parameters, fns, {}, batch, 0.75, key))
    return lambda batch: run(jax.tree.map(jnp.asarray, batch), jax.random.key(1))


def test_tokens_attend_to_earlier_ones_of_their_document(monkeypatch):
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]], np.int32)
    rows = {name: jnp.asarray(segments) for name in ("inputs", "positions", "segments")}
    context, masks = packed_context(rows, 1.5), []
    monkeypatch.setattr(attention, "attend", lambda query, key, value, mask: masks.append(mask) or query)
    layer = attention.FullAttention(CONFIG.model, nnx.Rngs(params=0))
    layer(jnp.zeros((*segments.shape, CONFIG.model.width)), context)
    (mask,) = masks
    for b in range(2):
        for i in range(6):
            for j in range(6):
                if segments[b, i]:
                    assert mask[b, i, j] == (j <= i and segments[b, i] == segments[b, j])
    np.testing.assert_array_equal(context.valid, segments > 0)
    assert context.capacity_factor == 1.5
    assert mask.any(axis=-1).all()  # an empty row of the mask would be a softmax over nothing


def test_the_loss_of_a_token_is_minus_the_logarithm_of_its_probability():
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 3, 5))
    batch = {"targets": random.integers(0, 5, (2, 3)), "segments": np.array([[1, 1, 0], [1, 0, 2]])}
    found = token_losses(jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, batch))
    for b in range(2):
        for i in range(3):
            total = sum(math.exp(logit) for logit in logits[b, i])
            expected = -math.log(math.exp(logits[b, i, batch["targets"][b, i]]) / total)
            assert float(found[b, i]) == pytest.approx(expected if batch["segments"][b, i] else 0, rel=1e-5)


def test_the_total_is_the_sum_of_its_parts():
    batch = tiny.batch(CONFIG)
    total, seen = losses()(batch)
    sums = seen["sums"]
    assert float(total) == pytest.approx(float(sums["cross_entropy"] + sums["balance_loss"] + sums["z_loss"]), rel=1e-6)
    assert float(sums["cross_entropy"]) == pytest.approx(float(seen["token_losses"].sum()), rel=1e-6)
    assert min(float(sums[name]) for name in ("cross_entropy", "balance_loss", "z_loss")) > 0
    assert sums["tokens"] == (batch["segments"] > 0).sum()
    assert sums["bytes"] == batch["bytes"].sum()


def test_the_content_of_padding_changes_no_loss_and_no_statistic():
    batch = tiny.batch(CONFIG)
    padding = batch["segments"] == 0
    random = np.random.default_rng(5)
    other = batch | {
        name: np.where(padding, random.integers(0, 16, padding.shape, np.int32), batch[name])
        for name in ("inputs", "targets", "positions")
    }
    assert (other["inputs"] != batch["inputs"]).any()
    tiny.equal(losses()(other), losses()(batch))


def test_a_batch_of_padding_alone_has_no_loss():
    batch = {name: np.zeros_like(value) for name, value in tiny.batch(CONFIG).items()}
    total, seen = losses()(batch)
    assert float(total) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(seen["sums"]))
