"""Regions and the losses that are of them, against loops. Real devices' regions are in tests/test_mesh.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm.mesh import make_mesh
from sparse_lm.routing.losses import by_region, load_balancing_loss, router_z_loss

G, S, E, K = 8, 6, 4, 2


def under(function, **sizes):
    """The function where a mesh of these sizes is in force; no device is needed for that."""
    devices = int(np.prod(list(sizes.values())))
    mesh = make_mesh(configs.Mesh(**{"data": 1} | sizes), jax.devices()[:1] * devices)

    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*map(jnp.asarray, args))

    return run


@pytest.mark.parametrize(
    "sizes, regions",
    [
        ({"data": 2}, 2),
        ({"data": 2, "fsdp": 2, "expert": 2}, 8),
        ({"expert": 2, "tensor": 2}, 2),  # the tensor axis divides no groups
        ({"tensor": 2}, 1),
    ],
)
def test_a_region_is_a_group_or_the_groups_of_a_device_or_all_of_them(sizes, regions):
    x = np.arange(3 * G, dtype=np.float32).reshape(G, 3)
    in_parts = lambda parts: np.stack([part.sum(axis=0) for part in np.split(x, parts)])
    for over, parts in {"group": G, "device": regions, "batch": 1}.items():
        np.testing.assert_array_equal(under(lambda x: by_region(x, over), **sizes)(x), in_parts(parts))


def test_without_a_mesh_one_device_has_all_groups():
    x = jnp.arange(G)
    assert by_region(x, "device").tolist() == by_region(x, "batch").tolist() == [G * (G - 1) // 2]


@pytest.mark.parametrize("over, regions", [("group", G), ("device", 2), ("batch", 1)])
def test_balance_is_that_of_each_region_times_its_tokens(over, regions):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(E), (G, S)).astype(np.float32)
    valid = random.random((G, S)) < 0.6
    valid[3] = False
    expert = np.where(valid[..., None], np.argsort(random.random((G, S, E)))[..., :K], -1)
    expected = 0.0
    for groups in np.split(np.arange(G), regions):
        f, p, tokens = np.zeros(E), np.zeros(E), 0
        for g in groups:
            for s in np.flatnonzero(valid[g]):
                p += probabilities[g, s]
                tokens += 1
                for e in expert[g, s]:
                    f[e] += 1
        expected += E * (f / K) @ p / max(tokens, 1)  # tokens · E · Σ (f / (K tokens)) (p / tokens)
    found = under(lambda *args: load_balancing_loss(*args, over), data=2)(probabilities, expert.astype(np.int32), valid)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_z_loss_is_of_valid_tokens():
    logits = jnp.array([[[0.0, 0.0], [1e4, 0.0], [3.0, 3.0]]])
    found = router_z_loss(logits, jnp.array([[True, False, True]]))
    assert found == pytest.approx(np.log(2) ** 2 + (3 + np.log(2)) ** 2)
