import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from sparse_lm.experts import EXECUTORS
from sparse_lm.models import functional
from sparse_lm.step.loss import loss, packed_context
from tests import tiny
from tests.oracles import decoder

INF = float("inf")
SPARSE = {"model__experts": 4, "model__router": tiny.switch()}


@functools.cache
def forward(executor=None):
    """(parameters, run) of the dense model or a sparse one; run(batch, factor, given) -> logits and experts chosen."""
    model = tiny.config(**({} if executor is None else SPARSE | {"model__executor": executor})).model
    made = functional(model)

    @functools.partial(jax.jit, static_argnums=1)
    def run(batch, factor, given):
        out = made.apply(parameters, batch["inputs"], packed_context(batch, factor), {}, None, given)
        return out.logits, None if out.aux is None else out.aux.chosen

    parameters = jax.jit(made.init)(jax.random.key(0))
    return lambda batch, factor=INF, given=None: run(jax.tree.map(jnp.asarray, batch), factor, given)


def with_other(batch, row, document, seed=9):
    """The batch with other tokens in one document (0 for padding)."""
    random = np.random.default_rng(seed)
    there = batch["segments"] == document
    there &= (np.arange(len(there)) == row)[:, None]
    assert there.any()
    other = random.integers(1, 64, there.shape, dtype=np.int32)
    return batch | {"inputs": np.where(there, other, batch["inputs"])}, there


@pytest.mark.parametrize(
    "fields",
    [
        {"model__layers": 5, "model__dense_first": 1, "model__tied_embeddings": False, "model__expert_width": 8},
        SPARSE | {"model__layers": 5, "model__dense_first": 1, "model__expert_width": 8, "model__executor": "gather"},
        SPARSE | {"model__expert_every": 1, "model__activation": "swiglu", "model__executor": "einsum"}
        | {"model__group_size": 32},
    ],
    ids=["dense", "gather", "einsum"],
)  # fmt: skip
def test_the_whole_decoder_is_the_loop(fields):
    config = tiny.config(**fields)
    made = functional(config.model)
    parameters = jax.jit(made.init)(jax.random.key(1))
    for place, width in enumerate((config.model.ffn_width, config.model.expert_width)[-config.model.expert_every :]):
        feed_forward = parameters["period"][place]["feed_forward"]
        assert feed_forward.get("experts", feed_forward)["into"].shape[-1] == width
    batch = tiny.batch(config)
    run = jax.jit(lambda p, b: made.apply(p, b["inputs"], packed_context(b, 1.0), made.init_router_state()))
    out = run(parameters, jax.tree.map(jnp.asarray, batch))
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), parameters)
    logits, experts = decoder.decoder(wide, config.model, batch, factor=1.0)
    assert out.logits.dtype == jnp.float32
    kept = batch["segments"] > 0
    tiny.close(np.asarray(out.logits)[kept], logits[kept])
    if out.aux is not None:
        np.testing.assert_array_equal(out.aux.chosen, experts)


@pytest.mark.parametrize("gated", ["gelu", "swiglu"])
def test_one_expert_begins_as_the_dense_model_of_the_same_seed(gated):
    fields = {"model__activation": gated, "model__init_scale": 0.1}
    key = jax.random.key(3)
    one = functional(tiny.config(model__experts=1, **fields).model).init(key)
    tiny.equal(tiny.dense(one), functional(tiny.config(**fields).model).init(key))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_expert_has_the_outputs_and_gradients_of_the_dense_model(executor, one_expert):
    one, parameters, expected = one_expert
    (_, seen), gradient = differentiated(tiny.config(**one, model__executor=executor), parameters)
    (_, dense_seen), dense_gradient = expected
    tiny.close(seen["token_losses"], dense_seen["token_losses"], 1e-6)
    tiny.close(tiny.dense(gradient), dense_gradient, 2e-6)
    assert not np.asarray(gradient["period"][1]["feed_forward"]["router"]["kernel"]).any()


@pytest.fixture(scope="module")
def one_expert():
    """Fields of a model of one expert, its parameters, and the loss and gradient of its dense twin with them."""
    one = {"model__experts": 1, "model__capacity_factor": 1.0, "model__router": tiny.switch()}
    parameters = jax.jit(functional(tiny.config(**one).model).init)(jax.random.key(0))
    return one, parameters, differentiated(tiny.config(), tiny.dense(parameters))


def differentiated(config, parameters):
    fns, batch = functional(config.model), jax.tree.map(jnp.asarray, tiny.batch(config))
    run = jax.value_and_grad(lambda p: loss(p, fns, {}, batch, 1.0, jax.random.key(1)), has_aux=True)
    return jax.jit(run)(parameters)


@pytest.mark.parametrize("executor", [None, *EXECUTORS])
def test_documents_do_not_see_each_other(executor):
    """Without a capacity, logits of a document are the same to the bit whatever else is in the batch."""
    run = forward(executor)
    batch = tiny.batch(tiny.config())
    logits, _ = map(np.asarray, run(batch))
    for document in (1, 2, 3):
        other, there = with_other(batch, 1, document)
        changed = np.asarray(run(other)[0])
        np.testing.assert_array_equal(changed[~there], logits[~there])
        assert (changed[there] != logits[there]).any()


@pytest.mark.parametrize("executor", [None, *EXECUTORS])
def test_later_tokens_are_not_seen(executor):
    run = forward(executor)
    batch = tiny.batch(tiny.config(), padding=(0,), documents=1)
    logits, _ = map(np.asarray, run(batch))
    inputs = batch["inputs"].copy()
    inputs[:, 9:] = 63 - inputs[:, 9:]
    np.testing.assert_array_equal(np.asarray(run(batch | {"inputs": inputs})[0])[:, :9], logits[:, :9])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_content_of_padding_changes_no_choice_and_no_logit(executor):
    run = forward(executor)
    batch = tiny.batch(tiny.config())
    logits, experts = map(np.asarray, run(batch, 0.5))
    other, padding = with_other(batch, 2, 0)
    changed, again = map(np.asarray, run(other, 0.5))
    np.testing.assert_array_equal(again, experts)
    np.testing.assert_array_equal(changed[batch["segments"] > 0], logits[batch["segments"] > 0])
    assert (experts.reshape(-1, *padding.shape)[:, batch["segments"] == 0] == -1).all()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_documents_meet_only_in_the_competition_for_places(executor):
    """Under a tight capacity a document's logits change with the document before it; not where routing is held fast."""
    run = forward(executor)
    batch = tiny.batch(tiny.config())
    others = (batch["segments"][1] != 1) & (batch["segments"][1] > 0)
    logits, experts = map(np.asarray, run(batch, 0.5))
    met = False
    for seed in range(4):
        other, there = with_other(batch, 1, 1, seed)
        free = np.asarray(run(other, 0.5)[0])
        met |= (free[1, others] != logits[1, others]).any()
        np.testing.assert_array_equal(np.delete(free, 1, axis=0), np.delete(logits, 1, axis=0))  # other groups
        held = np.asarray(run(other, 0.5, jnp.asarray(experts))[0])
        np.testing.assert_array_equal(held[~there], logits[~there])
    assert met


@pytest.mark.parametrize("scan, remat", [(True, "dots"), (True, "full"), (False, "none"), (False, "dots")])
def test_scanning_and_rematerialisation_change_no_gradient(scan, remat):
    tiny.close(gradients(scan, remat)[0], gradients(True, "none")[0], 2e-6)


@pytest.mark.parametrize("scan, remat", [(True, "dots"), (True, "full"), (False, "dots")])
def test_rematerialisation_computes_every_layers_activations_again(scan, remat):
    """Counted in the compiled program, since the compiler may find a repeated expression and remove it."""
    assert gradients(scan, remat)[1] == 2 * gradients(scan, "none")[1]


@functools.cache
def gradients(scan, remat):
    fields = {"model__layers": 3, "model__dense_first": 1, "model__expert_every": 1}
    fields |= {"model__expert_dropout": 0.1}
    fns = functional(tiny.config(**SPARSE, **fields, model__scan=scan, model__remat=remat).model)
    shapes = jax.eval_shape(fns.init, jax.random.key(0))
    random = np.random.default_rng(0)
    parameters = jax.tree.map(lambda s: 0.2 * random.normal(size=s.shape).astype(np.float32), shapes)
    batch = jax.tree.map(jnp.asarray, tiny.batch(tiny.config()))
    run = jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p, fns, {}, batch, 1.0, jax.random.key(0)))
    program = run.lower(parameters).compile()
    (total, _), gradient = program(parameters)
    return {"total": total, "gradient": gradient}, program.as_text().count(" tanh(")


def test_a_bfloat16_model_computes_in_bfloat16_and_keeps_float32_parameters():
    config = tiny.config(**SPARSE, model__dtype="bfloat16")
    fns = functional(config.model)
    batch = jax.tree.map(jnp.asarray, tiny.batch(config))
    parameters = jax.eval_shape(fns.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(lambda p: fns.apply(p, batch["inputs"], packed_context(batch, 1.0), {}).logits)(parameters)
    products = [e for e in _equations(program.jaxpr) if e.primitive.name == "dot_general"]
    wide = [e for e in products if all(v.aval.dtype == jnp.float32 for v in e.invars)]
    assert len(wide) < len(products)
    # What is computed in float32 is the router's, and a TPU must not split it into bfloat16 passes.
    assert all("HIGHEST" in str(e.params["precision"]) for e in wide), wide


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_the_gradient_of_a_frequent_token_is_not_lost_in_bfloat16():
    """The row of a token that stands 4,096 times adds up as many gradients; sums in bfloat16 stand still after 256."""
    fields = {"data__length": 512, "training__batch": 8, "model__tied_embeddings": False}
    gradients = []
    for dtype in ("float32", "bfloat16"):
        config = tiny.config(**fields, model__dtype=dtype)
        made, ids = functional(config.model), np.ones((8, 512), np.int32)
        batch = {"inputs": 7 * ids, "targets": 9 * ids, "segments": ids, "positions": 0 * ids, "bytes": ids[:, 0]}
        parameters = jax.jit(made.init)(jax.random.key(0))
        gradient, _ = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 4, 5))(
            parameters, made, {}, batch, INF, None
        )
        gradients.append(gradient["embedding"][7])
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=0, atol=0.05 * float(jnp.abs(gradients[0]).max()))
