"""Counts the matrix products in a traced program: what the counted FLOPs are compared with."""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from sparse_lm.config import Config
from sparse_lm.models import functional
from sparse_lm.step.loss import loss


def gradient_program(config: Config) -> Jaxpr:
    """The traced gradient of the loss of a batch, without optimizer."""
    model, fns = config.model, functional(config.model)
    rows = (config.training.batch, config.data.length)
    field = lambda *shape: jax.ShapeDtypeStruct(shape, "int32")
    batch = {name: field(*rows) for name in ("inputs", "targets", "segments", "positions")} | {"bytes": field(rows[0])}
    key = jax.eval_shape(lambda: jax.random.key(0))
    states = jax.eval_shape(fns.init, key), jax.eval_shape(fns.init_router_state)
    part = lambda p, r, b, k: jax.grad(loss, has_aux=True)(p, fns, r, b, model.capacity_factor, k)[0]
    return jax.make_jaxpr(part)(*states, batch, key).jaxpr


def dot_flops(program: Jaxpr, times: int = 1) -> int:
    """2 FLOPs for each multiply-add of the products, those inside a scan times its length."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += times * 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if isinstance(part, ClosedJaxpr):
                    total += dot_flops(part.jaxpr, inner)
                elif isinstance(part, Jaxpr):
                    total += dot_flops(part, inner)
    return total
