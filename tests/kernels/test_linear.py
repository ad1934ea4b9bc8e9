import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.kernels.linear import linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("inputs, outputs", [(3, (7,)), (7, (3,)), (4, (2, 3)), (1, (1,))], ids=str)
def test_the_product_and_its_gradients_are_numpys(rows, inputs, outputs, dtype):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    x, matrix, gradient = draw(*rows, inputs), draw(inputs, *outputs), draw(*rows, *outputs)
    y, backward = jax.vjp(linear, x, matrix)
    by_x, by_matrix = backward(gradient)
    wide = lambda a: np.asarray(a, np.float64)
    flat, g = wide(x).reshape(-1, inputs), wide(gradient).reshape(-1, np.prod(outputs))
    expected = [
        flat @ wide(matrix).reshape(inputs, -1),
        g @ wide(matrix).reshape(inputs, -1).T,
        flat.T @ g,
    ]
    rtol = 1e-5 if dtype == "float32" else 2e-2
    for found, like, value in zip((y, by_x, by_matrix), (gradient, x, matrix), expected):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)
        np.testing.assert_allclose(wide(found), value.reshape(like.shape), rtol=rtol, atol=rtol)


def test_a_wider_dtype_is_that_of_the_result_alone():
    x, matrix = jnp.ones((2, 3), jnp.bfloat16), jnp.full((3, 4), 1.01, jnp.bfloat16)
    y, backward = jax.vjp(lambda x, m: linear(x, m, jnp.float32), x, matrix)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 3 * float(matrix[0, 0]))
    assert [g.dtype for g in backward(y)] == [jnp.bfloat16, jnp.bfloat16]
