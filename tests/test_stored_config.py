"""Stored configs of this version and of older ones: what is missing, renamed, not known, or of another type."""

import copy
import json
import pathlib
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm import __version__, stored_config
from sparse_lm.config import Config, Data, Evaluation, Model, from_dict, identity_fields, resolve, to_dict
from sparse_lm.errors import UserError

ARCHIVES = sorted((pathlib.Path(__file__).parent / "fixtures/runs").glob("*.tar.xz"))
# Fields that came after 0.1.0, and what a run meant that had none of them.
ADDED = {
    "model.attention.name": "full",
    "model.attention.options": {},
    "model.feed_forward.name": "auto",
    "model.feed_forward.options": {},
    "model.layout.name": "dense",
    "model.layout.options": {},
    "model.shared_experts": 0,
    "model.balance_over": "group",
    "model.exchange_buffer": float("inf"),
    "evaluation.final_rows": 1,
    "training.anticipation.ahead": 0,
    "training.anticipation.spike": 1.0,
    "training.anticipation.steps": 200,
}


def stored_configs(archive):
    """What the config.json of each run in an archive holds, by the run's name."""
    with tarfile.open(archive) as tar:
        files = [name for name in tar.getnames() if name.endswith("/config.json")]
        return {name.split("/")[-2]: json.load(tar.extractfile(name)) for name in files}


def flat(values, prefix=""):
    """Values by their dotted paths."""
    found = {}
    for name, value in values.items():
        deeper = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return found


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_configs_of_released_versions_mean_what_they_meant(archive):
    runs = stored_configs(archive)
    assert "switch" in runs
    for stored in runs.values():
        there = flat(stored["config"])
        here = flat(to_dict(resolve(from_dict(stored["config"], written_by=stored["versions"]["sparse_lm"]))))
        assert {path: here[path] for path in there} == there
        assert {path: here[path] for path in here.keys() - there} == {path: ADDED[path] for path in here.keys() - there}


def test_the_list_of_added_fields_is_whole():
    (first,) = stored_configs(ARCHIVES[0]).values()
    assert flat(to_dict(Config())).keys() - flat(first["config"]) == ADDED.keys()


def test_a_config_from_before_a_field_is_of_the_same_identity_as_one_with_its_default():
    config = resolve(Config(model=Model(experts=4), data=Data(tokenizer="there.json")))
    old = to_dict(config)
    for path in ADDED:
        part, name, *_ = path.split(".")
        old[part].pop(name, None)
    old["data"]["tokenizer"] = "here.json"
    assert "attention" not in old["model"] and "feed_forward" not in old["model"]
    assert identity_fields(resolve(from_dict(old))) == identity_fields(config)
    assert identity_fields(config)["model.attention.name"] == "full"
    assert not any("tokenizer" in path for path in identity_fields(config))


def test_what_is_missing_takes_the_value_that_keeps_what_the_run_did():
    model = Model(executor="gather", eval_capacity_factor=2.0)
    expected = Config(model=model, evaluation=Evaluation(final_rows=1))
    assert from_dict({}) == expected != Config()
    assert from_dict({"model": {"width": 64}, "optimizer": {"router": {}}}).model == Model(
        width=64, executor="gather", eval_capacity_factor=2.0
    )


@pytest.mark.parametrize("path, value", list(stored_config.EARLIER_VALUES.items()))
def test_an_earlier_value_is_of_a_field_and_not_the_default_of_today(path, value):
    assert flat(to_dict(Config()))[path] != value
    assert flat(to_dict(from_dict({})))[path] == value


def stored_with(path, value):
    """Default values as they are stored, with another one at a path."""
    values = json.loads(json.dumps(to_dict(Config())))
    *parents, name = path.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
    section[name] = value
    return values


@pytest.mark.parametrize(
    "path, written_by, message",
    [
        (
            "model.expert",
            "9.1.0",
            "config.json has model.expert, which this version (VERSION) does not know; did you mean 'experts'? "
            "It was written by version 9.1.0",
        ),
        ("modle.width", "", "config.json has modle, which this version (VERSION) does not know; did you mean 'model'?"),
        (
            "optimizer.router.zzz",
            "9.1.0",
            "config.json has optimizer.router.zzz, which this version (VERSION) does not know; "
            "valid: learning_rate, weight_decay. It was written by version 9.1.0",
        ),
        (
            "model.router.zzz",
            "",
            "config.json has model.router.zzz, which this version (VERSION) does not know; valid: name, options",
        ),
        (
            "mesh.a\nb",
            "",
            "config.json has mesh.'a\\nb', which this version (VERSION) does not know; "
            "valid: data, expert, fsdp, tensor",
        ),
    ],
)
def test_a_field_that_is_not_known_is_refused_by_name(path, written_by, message):
    with pytest.raises(UserError) as error:
        from_dict(stored_with(path, 1), written_by=written_by)
    assert str(error.value) == message.replace("VERSION", __version__)


@pytest.mark.parametrize(
    "renamed, old, new",
    [
        ({"model.expert_count": "model.experts"}, {"model": {"expert_count": 8}}, {"model": {"experts": 8}}),
        (  # a section, and one field in it that had been renamed before
            {"optimizer.gate.rate": "optimizer.gate.learning_rate", "optimizer.gate": "optimizer.router"},
            {"optimizer": {"gate": {"rate": 2.0, "weight_decay": 3.0}}},
            {"optimizer": {"router": {"learning_rate": 2.0, "weight_decay": 3.0}}},
        ),
        ({"saving": "checkpoints"}, {"saving": {"every": 7, "keep": 3}}, {"checkpoints": {"every": 7, "keep": 3}}),
        (  # out of a section of its own, which is no more
            {"lookahead.ahead": "training.anticipation.ahead", "lookahead.spike": "training.anticipation.spike"},
            {"lookahead": {"ahead": 3, "spike": 0.5}, "training": {"seed": 1}},
            {"training": {"seed": 1, "anticipation": {"ahead": 3, "spike": 0.5}}},
        ),
        ({"a": "b", "b": "data.length"}, {"a": 64}, {"data": {"length": 64}}),
        ({"gate": "model.router"}, {"gate": {"name": "topk", "options": {"z": 1}}}, {"model": {"router": "as it was"}}),
        ({"model.options": "model.router"}, {"model": {"width": 64}}, {"model": {"width": 64}}),
    ],
)
def test_what_was_renamed_is_translated(monkeypatch, renamed, old, new):
    if "gate" in old:
        new = {"model": {"router": old["gate"]}}
    monkeypatch.setattr(stored_config, "RENAMED", renamed)
    given = copy.deepcopy(old)
    assert from_dict(given) == from_dict(new)
    assert given == old
    resolve(Config())  # names of today go through as they are


@pytest.mark.parametrize(
    "stored, message",
    [
        ({"saving": 3}, "config.json: checkpoints is 3; it must be a section with fields of its own"),
        (
            {"saving": {}, "checkpoints": {}},
            "config.json: saving and checkpoints, its new name, are both there; remove one",
        ),
        ({"size": 3, "model": []}, "config.json: model is []; it must be a section with fields of its own"),
        ({"data": "x"}, "config.json: data is 'x'; it must be a section with fields of its own"),
        ({"data": ["x"]}, "config.json: data is ['x']; it must be a section with fields of its own"),
        ({"data": None}, "config.json: data is None; it must be a section with fields of its own"),
    ],
)
def test_what_was_renamed_is_checked(monkeypatch, stored, message):
    renamed = {"saving": "checkpoints", "size": "model.width", "data.row": "data.length"}
    monkeypatch.setattr(stored_config, "RENAMED", renamed)
    with pytest.raises(UserError) as error:
        from_dict(stored)
    assert str(error.value) == message


def test_the_table_of_renamed_fields_leads_to_fields():
    valid = {path[:at] for path in flat(to_dict(Config())) for at in range(len(path) + 1) if path[at:][:1] in ("", ".")}
    old = stored_config.RENAMED.keys()
    assert not old & valid, "a name that was renamed is given to another field"
    assert set(stored_config.RENAMED.values()) - old <= valid


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model", "switch", "config.json: model is 'switch'; it must be a section with fields of its own"),
        (
            "optimizer.router",
            None,
            "config.json: optimizer.router is None; it must be a section with fields of its own",
        ),
        (
            "model.router",
            "switch",
            "config.json: model.router is 'switch'; it must be a section with fields of its own",
        ),
        ("model.router.name", None, "config.json: model.router.name is None; it must be of type str"),
        (
            "model.router.options",
            [],
            "config.json: model.router.options is []; it must be a section of options by thei",
        ),
        (
            "model.router.options",
            {"a.b": 1},
            "config.json: model.router.options is {'a.b': 1}; it must be a section of",
        ),
        (
            "model.router.options",
            {"__class__": 1},
            "options is {'__class__': 1}; it must be a section of options by th",
        ),
        ("model.width", 1.5, "config.json: model.width is 1.5; it must be of type int"),
        ("model.width", True, "config.json: model.width is True; it must be of type int"),
        ("model.scan", 1, "config.json: model.scan is 1; it must be of type bool"),
        (
            "optimizer.embedding.learning_rate",
            "1",
            "config.json: optimizer.embedding.learning_rate is '1'; it must be o",
        ),
        ("optimizer.learning_rate", 10**400, "it must be a number that fits a float"),
        ("data.sources", "stdlib", "config.json: data.sources is 'stdlib'; it must be a list of texts"),
        ("data.sources", ["stdlib", 1], "config.json: data.sources is ['stdlib', 1]; it must be a list of texts"),
    ],
)
def test_a_value_of_another_type_is_refused(path, value, message):
    with pytest.raises(UserError) as error:
        from_dict(stored_with(path, value))
    assert message in str(error.value)


@pytest.mark.parametrize("stored", [None, [], "config", 3])
def test_what_is_no_config_at_all_is_refused(stored):
    with pytest.raises(UserError, match=r"^config\.json: the config is .*; it must be a section"):
        from_dict(stored)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = sorted(
    {part for path in flat(to_dict(Config())) for part in (path, path.rpartition(".")[0], path + "x")} - {""}
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), JSON, min_size=1, max_size=3), JSON)
def test_whatever_is_stored_is_read_or_refused_on_one_line(changed, instead):
    values = to_dict(Config())
    for path, value in changed.items():
        *parents, name = path.split(".")
        section = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[name] = value
    for stored in (json.loads(json.dumps(values)), instead):
        try:
            resolve(from_dict(stored, file="runs/a/config.json", written_by="0.1.0"))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
