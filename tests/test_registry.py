import pytest
from flax import nnx

from sparse_lm.config import choice
from sparse_lm.errors import UserError
from sparse_lm.experts import EXECUTORS
from sparse_lm.models import functional
from sparse_lm.registry import create, lookup
from sparse_lm.routing import ROUTERS
from sparse_lm.step.optimizer import OPTIMIZERS
from sparse_lm.step.schedules import SCHEDULES
from tests import tiny


def make(needed, *, share: float = 0.5, count: int = 3, on: bool = True):
    return needed, share, count, on


TABLE = {"made": make, "plain": lambda needed: needed}


def test_options_are_passed_on_over_the_defaults():
    assert create("a.thing", TABLE, choice("made", share=0.1, on=False), "it") == ("it", 0.1, 3, False)
    assert create("a.thing", TABLE, choice("plain"), "it") == "it"


def test_a_whole_number_is_a_number():
    assert create("a.thing", TABLE, choice("made", share=1), "it")[1] == 1


@pytest.mark.parametrize(
    "made, message",
    [
        (choice("mad"), "a.thing.name is 'mad', which is not known; did you mean 'made'?"),
        (choice("xyz"), "a.thing.name is 'xyz', which is not known; valid: made, plain"),
        (choice("made", shar=1.0), "a.thing.options.shar is not an option of made; did you mean 'share'?"),
        (choice("made", xyz=1.0), "a.thing.options.xyz is not an option of made; valid: count, on, share"),
        (choice("plain", x=1), "a.thing.options.x is not an option of plain; it has none"),
        (choice("made", count=0.5), "a.thing.options.count is 0.5; it must be of type int"),
        (choice("made", count=True), "a.thing.options.count is True; it must be of type int"),
        (choice("made", on=1), "a.thing.options.on is 1; it must be of type bool"),
        (choice("made", share="half"), "a.thing.options.share is 'half'; it must be of type float"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(made, message):
    with pytest.raises(UserError) as error:
        create("a.thing", TABLE, made, "it")
    assert str(error.value) == message


@pytest.mark.parametrize("what, table", [("x", t) for t in (ROUTERS, EXECUTORS, OPTIMIZERS, SCHEDULES)])
def test_every_registered_name_is_found(what, table):
    for name, thing in table.items():
        assert lookup(what, table, name) is thing


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"model__router": choice("swich")},
            "model.router.name is 'swich', which is not known; did you mean 'switch'?",
        ),
        (
            {"model__router": choice("switch", jiter=0.1)},
            "model.router.options.jiter is not an option of switch; did you mean 'jitter'?",
        ),
        ({"model__executor": "gathr"}, "model.executor is 'gathr', which is not known; did you mean 'gather'?"),
    ],
)
def test_a_model_names_the_mistake(fields, message):
    with pytest.raises(UserError) as error:
        functional(tiny.config(model__experts=4, **fields).model)
    assert str(error.value) == message


def test_every_option_of_the_router_reaches_it():
    options = {"jitter": 0.5, "balance_loss": 0.25, "z_loss": 0.125}
    model = tiny.config(model__experts=4).model
    made = create("model.router", ROUTERS, choice("switch", **options), model, nnx.Rngs(params=0))
    assert {name: getattr(made, name) for name in options} == options
