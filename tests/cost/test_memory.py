import math

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.cost.arrays import parameter_arrays
from sparse_lm.errors import DoesNotFit, UserError
from sparse_lm.mesh import AXES, RULES
from sparse_lm.models import functional
from sparse_lm.step.optimizer import make_optimizer


def make(algorithm="adamw", **model):
    sizes = dict(vocabulary=512, width=256, layers=4, heads=4, kv_heads=2, ffn_width=384, experts=8) | model
    optimizer = configs.Optimizer(algorithm=configs.choice(algorithm))
    return configs.resolve(configs.Config(model=configs.Model(**sizes), optimizer=optimizer))


@pytest.mark.parametrize("algorithm", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("model", [{}, {"experts": 0, "activation": "geglu"}, {"dense_first": 2, "head_width": 128}])
def test_bytes_are_those_of_the_real_state(algorithm, model):
    config = make(algorithm, **model)
    fns = functional(config.model)
    parameters = fns.init(jax.random.key(0))
    bytes_of = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    counted = cost.compute_memory(config)
    assert counted.parameters == counted.gradients == bytes_of(parameters)
    assert counted.optimizer == bytes_of(make_optimizer(config, fns.axes).init(parameters))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 1, 1), (1, 1, 8, 1), (2, 1, 2, 2), (1, 2, 4, 2)])
def test_a_device_holds_its_shard(sizes):
    config, mesh = make(tied_embeddings=False, activation="swiglu"), AbstractMesh(sizes, AXES)
    local = 0
    for array in parameter_arrays(config.model):
        spec = PartitionSpec(*(RULES[axis] or None for axis in array.axes))
        local += math.prod(NamedSharding(mesh, spec).shard_shape(array.shape))
    counted = cost.compute_memory(config, configs.Mesh(*sizes))
    assert counted.parameters == 4 * local and 0 <= counted.optimizer - 8 * local < 100


def test_a_mesh_that_does_not_divide_the_sizes_is_refused():
    with pytest.raises(DoesNotFit, match="model.experts is 8, which mesh.expert=16 does not divide"):
        cost.compute_memory(make(), configs.Mesh(data=1, expert=16))


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="'adamv'.*did you mean 'adamw'"):
        cost.compute_memory(make("adamv"))
