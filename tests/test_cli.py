"""A mistake on the command line gets one line that says what would be right, exit code 2, and leaves nothing behind."""

import json
import subprocess
import sys

import pytest

from sparse_lm import cli
from tests import commands


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return commands.write_config(tmp_path_factory.mktemp("cli"))


TRAIN = ["train", "--config=configs/quickstart.py"]
FROM = "from sparse_lm.config import Config, Model\ndef get_config(): return "


def said(capsys, *arguments: str, code: int = 2) -> str:
    """What a command says, run in this process; checks the exit code and that it is one line."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    assert left.value.code == code and captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("sparse-lm: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (["trian"], "did you mean 'train'?"),
        (["train"], "--config=FILE is missing"),
        (["train", "--config", "configs/quickstart.py"], "flags are written --flag=value, as in --config="),
        (["train", "--confg=configs/quickstart.py"], "--confg is not a flag of train; did you mean 'config'?"),
        (["info", "--workdir=x"], "--workdir is not a flag of info"),
        (["train", "--config=nothing.py"], "nothing.py does not exist"),
        (["evaluate"], "--workdir=DIR is missing"),
        (["evaluate", "--workdir=nowhere"], "there is no run in nowhere: it does not exist"),
        (["generate", "--workdir=nowhere"], "give --prompt=TEXT"),
        (["generate", "--mesh.fsd=2"], "--mesh.fsd is not a flag of generate; did you mean 'mesh.fsdp'?"),
        (["replay", "--workdir=nowhere"], "--step=N is missing"),
        (
            ["train", "--config=configs/quickstart.py", "--workdir=nothing", "--init-from=nowhere@3"],
            "there is no run in ",
        ),
        (["compare", "one", "two"], "there is no run in one"),
        (["compare", "one"], "two runs"),
        (["compare", "one", "two", "--seeds=2"], "--seeds is for runs to be trained; one and two are done"),
        (["compare", "one", "two", "--price-per-hour=nan"], "--price-per-hour is nan"),
        (["compare", "one", "two", "--price-per-hour=-1"], "price_per_hour"),
        ([*TRAIN, "--coordinator=x"], "--coordinator is 'x'; it must be HOST:PORT"),
        ([*TRAIN, "--coordinator=x:99999", "--processes=2"], "--coordinator is 'x:99999'; it must be HOST:PORT"),
        ([*TRAIN, "--processes=0"], "--process is 0 and --processes 0; they are numbered from 0"),
        ([*TRAIN, "--processes=-1"], "--process is 0 and --processes -1"),
        ([*TRAIN, "--process=5"], "--process is 5 and --processes 1"),
        ([*TRAIN, "--processes=2"], "--processes is 2; it needs --coordinator=HOST:PORT"),
        ([*TRAIN, "--workdir=bad://x"], "bad:// is no store that can be used"),
        ([*TRAIN, "--workdir=nothing", "--init-from=nowhere@²"], "there is no run in "),
        ([*TRAIN, "--config.training.watchdog=1e-9"], "it must be 0 or at least 1 second"),
        (["generate", "--workdir=nowhere", "--prompt=\udcff"], "--prompt is not UTF-8"),
    ],
)
def test_a_wrong_command(capsys, arguments, answer):
    assert answer in said(capsys, *arguments)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("def get_config(: pass", "is not Python: line 1"),
        ("x = 1", "lacks get_config()"),
        ("def get_config(): return 3", "returns a int, not a sparse_lm.config.Config"),
        ("def get_config(): raise SystemExit(3)", "get_config() fails: SystemExit: 3"),
        (
            f"{FROM}Config(model=Model(width='x'))",
            "model.width is 'x'; it must be of type int",
        ),
        (
            f"{FROM}Config(model=Model(router=None))",
            "Model.router is None; it must be a Choice",
        ),
        ("import nothing_of_this_name", "fails: ModuleNotFoundError"),
        ("def get_config(): return 1 / 0", "get_config() fails: ZeroDivisionError"),
    ],
)
def test_a_config_file_that_is_none(capsys, tmp_path, text, answer):
    (tmp_path / "config.py").write_text(text)
    assert answer in said(capsys, "info", f"--config={tmp_path}/config.py")


@pytest.mark.parametrize(
    "field, answer",
    [
        ("model.expert=4", "no field 'expert'; did you mean 'experts'?"),
        ("modl.experts=4", "no field 'modl'; did you mean 'model'?"),
        ("model=4", "is a part with fields of its own"),
        ("model.experts.x=4", "it is a value, 8"),
        ("model.experts=many", "it must be a whole number, not 'many'"),
        ("model.capacity_factor=wide", "it must be a number, not 'wide'"),
        ("model.scan=5", "it must be true or false, not '5'"),
        ("model.capacity_factor=0", "model.capacity_factor is 0.0; it must be above 0"),
        ("model.eval_capacity_factor=-1", "it must be above 0"),
        ("model.top_k=9", "model.top_k is 9, above model.experts=8"),
        ("model.top_k=2", "sends each token to 1 expert"),
        ("model.heads=5", "model.heads is 5, which does not divide model.width 32; the nearest that does is 4"),
        ("model.layers=3", "multiple of model.expert_every=2"),
        ("model.group_size=24", "does not divide the tokens of a microbatch"),
        ("training.accumulation=3", "training.accumulation is 3, which does not divide training.batch 8"),
        ("model.router.name=swich", "did you mean 'switch'?"),
        ("model.router.options.jiter=0.1", "did you mean 'jitter'?"),
        ("model.router.options.jitter=much", "must be of type float"),
        ("model.executor=einsums", "did you mean 'einsum'?"),
        ("model.activation=relu", "model.activation is 'relu'"),
        ("optimizer.algorithm.name=adam", "did you mean 'adamw'?"),
        ("optimizer.schedule.name=cosin", "did you mean 'cosine'?"),
        ("mesh.data=3", "mesh.data=3, mesh.fsdp=1, mesh.expert=1, mesh.tensor=1 needs 3 devices; there are 1"),
        ("mesh.expert=3", "needs a multiple of 3 devices"),
        ("data.sources=folder:nowhere", "nowhere"),
        ("data.sources=tfds:no_such_set", "no_such_set"),
        ("evaluation.splits=valdation", "did you mean 'validation'?"),
        ("training.steps=0", "training.steps is 0"),
        (
            "model.router.name=soft model.executor=gather",
            "can't express the SoftSlots of the router 'soft'; these can: auto, einsum",
        ),
        ("model.router.name=expert_choice model.executor=grouped", "these can: auto, einsum, gather"),
        (
            "model.router.name=deepseek model.router.options.groups=3",
            "groups is 3, which does not divide model.experts=8",
        ),
        (
            "model.router.name=deepseek model.router.options.groups=4 model.top_k=3",
            "model.top_k is 3, above the 2 experts of groups_kept=1 groups",
        ),
        (
            "model.experts=0 model.layout.name=banded model.layout.options.block=48",
            "block is 48, which does not divide",
        ),
        (
            "model.experts=0 model.layout.name=banded model.layout.options.block=8 model.layout.options.density=0.01",
            "density is 0.01",
        ),
        ("model.layout.name=banded", "model.experts must be 0"),
        ("model.balance_over=world", "model.balance_over is 'world'"),
        ("=3", "config has no field ''"),
        ("model.router.options.=5", "an option is written --config.model.router.options.NAME=VALUE"),
        ("model.router.options.jitter.x=5", "an option is written --config.model.router.options.NAME=VALUE"),
        ("model.router.options.jitter=-1", "model.router.options.jitter is -1; it must be at least 0 and at most 1"),
        (
            "optimizer.algorithm.options.b1=1.5",
            "optimizer.algorithm.options.b1 is 1.5; it must be at least 0",
        ),
        ("data.sources=None", "data source 'None': unknown kind 'None'"),
        ("data.sources=", "data source '': unknown kind ''"),
        ("evaluation.splits=0", "evaluation.splits names '0', which the data has not"),
        ("model.dropout=None", "it must be a number, not 'None'"),
        ("model.layers=4294967296", "model.layers is 4294967296; it must be at least 1 and at most 10,000"),
        ("name=../../../x", "name is '../../../x'; it must be without slashes"),
    ],
)
def test_a_wrong_field(capsys, config, tmp_path, field, answer):
    workdir = tmp_path / "run"
    fields = [f"--config.{one}" for one in field.split()]
    command = ["train", f"--config={config}", f"--workdir={workdir}", *fields]
    assert answer in said(capsys, *command)
    assert not workdir.exists()


def test_sizes_that_the_mesh_does_not_divide(config, tmp_path):
    """In a process with eight devices: experts, batch and groups, each with the nearest size that would do."""
    for fields, answer in {
        "mesh.expert=8 model.experts=12": "model.experts is 12, which mesh.expert=8 does not divide; the nearest",
        "mesh.data=8 training.batch=12": "is 12, which mesh.data=8",
        "mesh.tensor=8": "model.kv_heads is 4, which mesh.tensor=8 does not divide",
    }.items():
        flags = [f"--config.{field}" for field in fields.split()]
        workdir = f"--workdir={tmp_path}/run"
        assert answer in commands.run("train", f"--config={config}", workdir, *flags, code=2, devices=8)
        assert not (tmp_path / "run").exists()


def test_a_folder_that_another_process_writes_to(capsys, config, tmp_path):
    command = ["train", f"--config={config}", f"--workdir={tmp_path}/run", "--config.training.steps=5"]
    commands.run(*command)
    holder = (
        "import time; from sparse_lm.runs.folder import RunFolder, read_config, read_info; "
        f"p = '{tmp_path}/run'; f = RunFolder(p, read_config(p), read_info(p)); "
        "print('held', flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        answer = said(capsys, *command, "--config.training.steps=6")
        assert str(process.pid) in answer
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_has_seen_enough_is_nobodys_mistake(config):
    command = f"{sys.executable} -m sparse_lm info --config={config} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141) and done.stderr == "" and done.stdout.count("\n") == 1


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2 and "compare" in capsys.readouterr().out
    cli.main(["train", "--help"])
    assert "--init-from" in capsys.readouterr().out


def test_orbax_is_quiet_within_a_command_alone(monkeypatch):
    seen, before = [], sys.unraisablehook
    look = cli.COMMANDS["replay"]._replace(run=lambda options: seen.append(sys.unraisablehook))
    monkeypatch.setitem(cli.COMMANDS, "replay", look)
    cli.main(["replay"])
    assert seen != [before] and sys.unraisablehook is before


def test_commands_work_on_a_run(capsys, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = "--workdir=run"
    cli.main(["train", f"--config={config}", workdir])
    capsys.readouterr()
    cli.main(["evaluate", workdir])
    evaluated = capsys.readouterr()
    found = json.loads(evaluated.out)
    assert (found["step"], found["leak"], found["sources"]) == (20, "", [f"folder:{config.parent}/text"])
    (tmp_path / "other").mkdir()
    for i in range(60):
        (tmp_path / f"other/{i}.txt").write_text(f"the {i} cats sat on mats all day long and went away " * 5)
    cli.main(["evaluate", workdir, "--sources=folder:other", f"--sources=folder:{config.parent}/text"])
    measured = json.loads(capsys.readouterr().out)
    assert measured["sources"] == ["folder:other", f"folder:{config.parent}/text"]
    assert measured["evaluation"].keys() >= {"validation_other", "validation_text", "test"}
    cli.main(["generate", workdir, "--prompt=the cat", "--tokens=5", "--temperature=0"])
    generated = capsys.readouterr()
    assert generated.out.startswith("the cat")
    assert "WARNING" not in evaluated.err + generated.err  # the router looks at nothing ahead
    cli.main(["evaluate", workdir, "--mesh.fsdp=1"])
    assert json.loads(capsys.readouterr().out) == found
    assert "mesh.fsdp=3, mesh.expert=1, mesh.tensor=1 needs a multiple of 3 devices; there are 1" in said(
        capsys, "generate", workdir, "--prompt=the cat", "--mesh.fsdp=3"
    )
    cli.main(["replay", workdir, "--step=7"])
    assert "step 7, run again" in capsys.readouterr().out
    cli.main(["info", f"--config={config}"])
    assert "active per token" in capsys.readouterr().out


def test_it_is_said_where_the_routing_looks_ahead(capsys, config, tmp_path):
    def warned(*command):
        cli.main([*command, f"--workdir={tmp_path}/run"])
        out, err = capsys.readouterr()
        return out, [line for line in err.splitlines() if line.startswith("WARNING")]

    _, trained = warned(
        "train", f"--config={config}", "--config.training.steps=4", "--config.model.router.name=expert_choice"
    )
    out, evaluated = warned("evaluate")
    _, generated = warned("generate", "--prompt=the cat", "--tokens=2")
    measured, ahead = json.loads(out), "experts choose among all tokens of a group"
    assert measured["leak"] == ahead and not measured["evaluation"]["validation"]["causal"]
    loss = "this loss is not that of a causal language model"
    instead = "in generation each token goes to its top_k best experts"
    assert trained + evaluated + generated == [
        f"WARNING: validation: the routing looks ahead; {loss}",
        f"WARNING: {loss}: {ahead}",
        f"WARNING: while the model was trained, {ahead}; {instead}",
    ]
