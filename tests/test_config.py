import dataclasses
import json
import subprocess
import sys

import pytest
from absl import flags

from sparse_lm.command_line import define_config, quote_text
from sparse_lm.config import (
    Config,
    Data,
    Mesh,
    Model,
    Optimizer,
    Training,
    choice,
    digest,
    from_dict,
    identity_fields,
    resolve,
    to_dict,
)
from sparse_lm.cost.twin import dense_twin
from sparse_lm.errors import UserError


def test_what_is_derived():
    model = resolve(Config(model=Model(width=96, heads=6, ffn_width=200, experts=2), data=Data(length=128))).model
    assert (model.kv_heads, model.head_width, model.expert_width, model.group_size) == (6, 16, 200, 128)


def test_what_is_set_is_not_derived():
    given = Model(width=96, heads=6, kv_heads=3, head_width=8, expert_width=64, group_size=64, experts=2)
    model = resolve(Config(model=given, data=Data(length=128))).model
    assert (model.kv_heads, model.head_width, model.expert_width, model.group_size) == (3, 8, 64, 64)


@pytest.mark.parametrize("experts", [0, 4])
def test_resolving_twice_changes_nothing(experts):
    config = Config(model=Model(experts=experts, router=choice("switch", jitter=0.5)))
    once = resolve(config)
    assert resolve(once) == once
    assert to_dict(resolve(once)) == to_dict(once)


def test_a_resolved_config_is_a_frozen_copy():
    config = Config(model=Model(router=choice("switch", jitter=0.5)))
    resolved = resolve(config)
    config.model.width = 64
    config.model.router.options.jitter = 0.25
    assert (resolved.model.width, resolved.model.router.options.jitter) == (128, 0.5)
    for node, name in ((resolved, "name"), (resolved.model, "width"), (resolved.model.router, "name")):
        with pytest.raises(AttributeError, match="frozen"):
            setattr(node, name, "other")
    with pytest.raises(AttributeError):
        resolved.model.router.options.jitter = 1.0


def test_a_config_survives_json():
    config = resolve(Config(name="x", model=Model(experts=4, router=choice("switch", jitter=0.5)), mesh=Mesh(expert=2)))
    again = resolve(from_dict(json.loads(json.dumps(to_dict(config)))))
    assert again == config
    assert digest(to_dict(again)) == digest(to_dict(config)) != digest(to_dict(Config()))


def test_infinite_capacity_survives_json():
    config = resolve(Config(model=Model(experts=4, eval_capacity_factor=float("inf"))))
    assert resolve(from_dict(json.loads(json.dumps(to_dict(config))))) == config


def test_the_twin_has_a_dense_layer_as_wide_as_the_experts_of_a_token():
    made = Model(experts=8, top_k=2, expert_width=48, ffn_width=200, router=choice("topk"))
    config = Config(name="x", model=made)
    dense = dense_twin(config)
    changed = {k for k, v in to_dict(dense)["model"].items() if v != to_dict(resolve(config))["model"][k]}
    assert changed == {"experts", "top_k", "expert_width"}
    assert (dense.model.experts, dense.model.expert_width, dense.model.ffn_width) == (0, 96, 200)
    assert dense.name == "x-dense"
    for part in ("data", "mesh", "optimizer", "training", "evaluation"):
        assert getattr(dense, part) == getattr(resolve(config), part)
    with pytest.raises(UserError, match="no dense twin"):
        dense_twin(dense)


def test_identity_leaves_out_what_may_change_on_the_way():
    config = resolve(Config(name="one"))
    free = dataclasses.replace(
        config,
        name="other",
        mesh=Mesh(data=2),
        training=dataclasses.replace(config.training, steps=7, accumulation=2, watchdog=1.0),
        data=dataclasses.replace(config.data, tokenizer="/moved/tokenizer.json"),
        cache="/elsewhere",
    )
    assert identity_fields(resolve(free)) == identity_fields(config)
    for path, other in {
        "model": Model(width=64, heads=2),
        "data": Data(length=64),
        "optimizer": Optimizer(learning_rate=1.0),
        "training": Training(seed=1),
    }.items():
        assert identity_fields(resolve(dataclasses.replace(config, **{path: other}))) != identity_fields(config)


def given(path, value):
    config = Config(model=Model(experts=4))
    part, name = path.split(".")
    setattr(getattr(config, part), name, value)
    return config


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("model.capacity_factor", 0.0, "model.capacity_factor is 0.0; it must be above 0"),
        ("model.capacity_factor", float("nan"), "model.capacity_factor is nan; it must be above 0"),
        ("model.eval_capacity_factor", -1.0, "model.eval_capacity_factor is -1.0; it must be above 0"),
        ("model.layers", 0, "model.layers is 0; it must be at least 1"),
        ("model.top_k", 5, "model.top_k is 5, above model.experts=4"),
        ("model.experts", -1, "model.experts is -1; it must be at least 0"),
        ("model.activation", "swigl", "model.activation is 'swigl'; did you mean 'swiglu'?"),
        ("model.dtype", "int8", "model.dtype is 'int8'; valid: bfloat16, float32"),
        ("model.remat", "ful", "model.remat is 'ful'; did you mean 'full'?"),
        ("model.dropout", 1.0, "model.dropout is 1.0; it must be at least 0 and below 1"),
        ("model.expert_dropout", -0.1, "model.expert_dropout is -0.1; it must be at least 0 and below 1"),
        ("model.heads", 5, "model.heads is 5, which does not divide model.width 128; the nearest that does is 4"),
        ("model.kv_heads", 3, "model.kv_heads is 3, which does not divide model.heads 4; the nearest that does is 2"),
        ("model.head_width", 7, "model.head_width is 7; rotary positions need an even number"),
        ("model.layers", 5, "must be a multiple of model.expert_every=2; the nearest is 4"),
        ("model.dense_first", 4, "after model.dense_first=4 it must be a multiple of model.expert_every=2; the near"),
        ("model.dense_first", -1, "model.dense_first is -1"),
        ("model.group_size", 500, "model.group_size is 500, which does not divide"),
        ("model.group_size", 500, "the nearest that does is 512"),
        ("training.accumulation", 3, "training.accumulation is 3, which does not divide training.batch 16; the near"),
        ("training.steps", 0, "training.steps is 0"),
        ("training.batch", -4, "training.batch is -4; it must be at least 1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate is 0.0; it must be above 0"),
        ("optimizer.clip_norm", -1.0, "optimizer.clip_norm is -1.0"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps is -1"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay is -0.1"),
        ("mesh.data", 0, "mesh.data=0, mesh.fsdp=1, mesh.expert=1, mesh.tensor=1: each must be at least 1"),
        ("mesh.fsdp", -1, "one of them may be -1"),
        ("model.feed_forward", choice("dense"), "model.feed_forward is 'dense', and model.experts=4"),
        (
            "model.feed_forward",
            choice("auto", rank=4),
            "model.feed_forward.options are {'rank': 4}; they need a mod",
        ),
    ],
)
def test_a_mistake_is_answered_with_one_line(path, value, words):
    with pytest.raises(UserError) as error:
        resolve(given(path, value))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, cache", [("../../x", "c"), ("a/b", "c"), ("..", "c"), ("x", "")])
def test_names_and_folders_lead_nowhere_else(name, cache):
    with pytest.raises(UserError, match="^name is|^cache is"):
        resolve(Config(name=name, cache=cache))


@pytest.mark.parametrize("make", [lambda: Model(router="switch"), lambda: Model(router=None), lambda: Config(model={})])
def test_a_section_is_no_other_value(make):
    with pytest.raises(TypeError, match="it must be a (Choice|Model)"):
        make()


def test_a_config_is_read_without_jax():
    code = "import sparse_lm.config, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_kinds_of_layers_are_set_on_the_command_line(tmp_path, part):
    file = tmp_path / "config.py"
    file.write_text("from sparse_lm.config import Config as get_config")
    values = flags.FlagValues()
    argv = ["x", f"--config={file}", f"--config.model.{part}.name=other", f"--config.model.{part}.options.rate=0.5"]
    define_config(values, argv)
    values(argv)
    assert to_dict(getattr(values.config.model, part)) == {"name": "other", "options": {"rate": 0.5}}


@pytest.mark.parametrize(
    "field, value, read",
    [
        ("data.sources", "folder:/a b,c", ("folder:/a b,c",)),
        ("data.sources", "folder:/it's (1)", ("folder:/it's (1)",)),
        ("data.sources", 'folder:/a"b', ('folder:/a"b',)),
        ("data.sources", "folder:x?weight=2&max_epochs=4", ("folder:x?weight=2&max_epochs=4",)),
        ("data.sources", "('stdlib', 'folder:/x, y')", ("stdlib", "folder:/x, y")),
        ("data.sources", "", ("",)),
        ("evaluation.splits", "test", ("test",)),
        ("evaluation.splits", "()", ()),
    ],
)
def test_a_text_is_taken_whole(tmp_path, field, value, read):
    file, values = tmp_path / "config.py", flags.FlagValues()
    file.write_text("from sparse_lm.config import Config as get_config")
    argv = ["x", f"--config={file}", quote_text(f"--config.{field}={value}")]
    define_config(values, argv)
    values(argv)
    part, name = field.split(".")
    assert getattr(getattr(values.config, part), name) == read
