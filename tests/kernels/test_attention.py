import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.attention import attend


def case(length, positions, heads, kv_heads, dtype="float32"):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    query, key, value = draw(2, length, heads, 4), draw(2, positions, kv_heads, 4), draw(2, positions, kv_heads, 4)
    return query, key, value, jnp.asarray(random.random((2, length, positions)) < 0.6)


def by_jax(query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="xla")


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length, positions", [(5, 5), (1, 7), (6, 3)])
def test_attention_and_its_gradients_are_jaxs(length, positions, heads, kv_heads):
    *inputs, mask = case(length, positions, heads, kv_heads)
    mask = mask.at[0, 0].set(False)  # a row that attends to nothing
    (found, by_hand), (expected, derived) = (
        jax.vjp(lambda *inputs, f=f: f(*inputs, mask), *inputs) for f in (attend, by_jax)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=found.shape), jnp.float32)
    for a, b in zip(by_hand(gradient), derived(gradient)):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_bfloat16_is_about_as_near_to_the_truth_as_jaxs():
    *inputs, mask = case(16, 16, 4, 2, "bfloat16")
    wide = [x.astype(jnp.float32) for x in inputs]
    total = lambda f: lambda *inputs: (f(*inputs, mask).astype(jnp.float32) ** 2).sum()
    gradients = lambda f, inputs: jax.grad(total(f), argnums=(0, 1, 2))(*inputs)
    for found, jaxs, true in zip(gradients(attend, inputs), gradients(by_jax, inputs), gradients(by_jax, wide)):
        assert found.dtype == jnp.bfloat16
        error = lambda x: float(jnp.abs(x.astype(jnp.float32) - true).mean())
        assert error(found) < 1.5 * error(jaxs)
