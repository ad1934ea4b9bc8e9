import math

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.cost.arrays import parameter_arrays
from sparse_lm.errors import UserError
from sparse_lm.mesh import AXES, RULES
from sparse_lm.models import functional
from sparse_lm.step.optimizer import make_optimizer


def make(algorithm="adamw", **model):
    sizes = dict(vocabulary=512, width=256, layers=4, heads=4, kv_heads=2, ffn_width=384, experts=8) | model
    optimizer = configs.Optimizer(algorithm=configs.choice(algorithm))
    return configs.resolve(configs.Config(model=configs.Model(**sizes), optimizer=optimizer))


def held(state):
    """Bytes of the moments, without counters, coefficients and the placeholders of one number that optax has too."""
    moments = lambda path: str(path[-1]) not in (".count", ".ns_coeffs") and ".ns_coeffs" not in map(str, path)
    leaves = [leaf for path, leaf in jax.tree.leaves_with_path(state) if moments(path)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.shape[-1:] not in ((), (1,)))


@pytest.mark.parametrize("algorithm", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("model", [{}, {"experts": 0, "activation": "geglu"}, {"dense_first": 2, "head_width": 128}])
def test_bytes_are_those_of_the_real_state(algorithm, model):
    config = make(algorithm, **model)
    fns = functional(config.model)
    parameters = jax.eval_shape(fns.init, jax.random.key(0))
    state = jax.eval_shape(make_optimizer(config, fns.axes).init, parameters)
    counted = cost.compute_memory(config)
    assert counted.parameters == counted.gradients == 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert counted.optimizer == held(state)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 1, 1), (1, 1, 8, 1), (2, 1, 2, 2), (1, 2, 4, 2)])
def test_a_device_holds_its_shard(sizes):
    config, mesh = make(tied_embeddings=False, activation="swiglu"), AbstractMesh(sizes, AXES)
    local = 0
    for array in parameter_arrays(config.model):
        spec = PartitionSpec(*(RULES[axis] or None for axis in array.axes))
        local += math.prod(NamedSharding(mesh, spec).shard_shape(array.shape))
    assert cost.compute_memory(config, configs.Mesh(*sizes)).parameters == 4 * local


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="'adamv'.*did you mean 'adamw'"):
        cost.compute_memory(make("adamv"))
