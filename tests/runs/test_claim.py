"""A folder in an object store has one owner at a time: in memory, and on a server that speaks Google's API."""

import concurrent.futures
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest
import tensorstore as ts
from etils import epath

from sparse_lm import config as configs
from sparse_lm import runs
from sparse_lm.errors import UserError
from sparse_lm.runs import claim as claims
from sparse_lm.runs.claim import Claim, Lock, hold_folder
from sparse_lm.runs.folder import RunFolder, read_config, read_rows
from tests import commands, gcs_server

RENEWED, LAPSES = 0.2, 3.0  # seconds
INFO = {"fingerprint": "abc"}


@pytest.fixture(scope="module")
def server():
    with gcs_server.serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # it has read the environment already
        yield server


class Place:
    """A folder, what is in it, and the claims on it."""

    def __init__(self, folder: str, context: ts.Context):
        self.folder, self.context, self.claims = folder, context, []
        self.store = ts.KvStore.open(f"{folder}/", context=context).result()

    def claim(self, while_waiting=lambda: None) -> Claim:
        self.claims.append(made := Claim(self.folder, while_waiting, RENEWED, LAPSES, self.context))
        return made

    def read(self):
        return self.store.read(claims.NAME).result()

    def write(self, value) -> None:
        self.store.write(
            claims.NAME, value if value is None or isinstance(value, bytes) else json.dumps(value)
        ).result()


@pytest.fixture(params=["memory", "gs"])
def place(request):
    if request.param == "gs":
        request.getfixturevalue("server")
    made = Place(f"{request.param}://bucket/{time.time_ns()}/run", ts.Context())
    yield made
    for claim in made.claims:
        claim.release()


@pytest.fixture
def cloud(server):
    """A place on the server, whose faults are repaired afterwards."""
    made = Place(f"gs://bucket/{time.time_ns()}/run", ts.Context())
    yield made
    server.down, server.deaf = False, 0
    for claim in made.claims:
        claim.release()


def die(claim: Claim) -> None:
    """As if its process had been killed."""
    claim._released.set()
    claim._thread.join()


def eventually(true, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def someone(owner: str = "x") -> dict:
    return {"holder": "process 1 on elsewhere", "owner": owner, "writes": 1}


def test_a_free_folder_is_held_at_once_and_a_released_one_is_free(place):
    for _ in range(2):
        begun = time.monotonic()
        claim = place.claim()
        assert json.loads(place.read().value)["holder"].startswith(f"process {os.getpid()} on ")
        assert time.monotonic() - begun < LAPSES and claim.lost == ""
        claim.release()
        assert place.read().state == "missing" and not claim._thread.is_alive() and claim.lost == ""


def test_a_living_owner_keeps_others_out(place, caplog):
    claim = place.claim()
    first = place.read()
    with pytest.raises(UserError) as error:
        place.claim()
    assert re.fullmatch(
        f"{place.folder} is in use by process {os.getpid()} on .*; wait for it, end it, or choose another --workdir",
        str(error.value),
    )
    (said,) = caplog.messages
    assert re.fullmatch(
        f"{place.folder} is held by process {os.getpid()} on .*; waiting at most 3 s for its claim to lapse", said
    )
    eventually(lambda: place.read().stamp.generation != first.stamp.generation)
    assert place.read().value != first.value  # the generation of S3 is a digest of the content
    time.sleep(LAPSES / 2)
    assert claim.lost == ""


def test_the_claim_of_a_dead_owner_lapses(place):
    die(first := place.claim())
    begun = time.monotonic()
    second = place.claim()
    assert LAPSES <= time.monotonic() - begun < LAPSES + 10
    assert "was not renewed for" in first.lost and second.lost == ""
    first.release()
    assert json.loads(place.read().value)["owner"] == second._owner


@pytest.mark.parametrize("lapsed", [False, True])
def test_of_several_that_come_at_once_one_wins(place, monkeypatch, lapsed):
    if lapsed:
        die(place.claim())
    together, write = threading.Barrier(4), Claim._write

    def at_once(claim, generation):
        if claim._writes == 0:
            together.wait(60)
        return write(claim, generation)

    monkeypatch.setattr(Claim, "_write", at_once)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ended = [pool.submit(place.claim) for _ in range(4)]
    errors = [future.exception() for future in ended]
    (winner,) = (future.result() for future in ended if future.exception() is None)
    assert all(isinstance(e, UserError) and "is in use by" in str(e) for e in errors if e is not None)
    assert json.loads(place.read().value)["owner"] == winner._owner


def test_a_claim_is_lost_to_who_takes_it_over(place):
    claim = place.claim()
    place.write(someone())
    eventually(lambda: claim.lost)
    assert claim.lost == f"{place.folder} is no longer held: process 1 on elsewhere has taken it over"
    claim.release()
    assert json.loads(place.read().value) == someone()


def test_a_claim_is_lost_when_it_is_deleted(place):
    claim = place.claim()
    place.write(None)
    eventually(lambda: claim.lost)
    assert claim.lost == f"{place.folder} is no longer held: its claim is gone"
    time.sleep(2 * RENEWED)
    assert place.read().state == "missing"


@pytest.mark.parametrize("damaged", [b"", b"\xff\x00", b"[3]", b'{"holder": 3, "owner": "x"}', b'{"holder": "me'])
def test_a_damaged_claim_is_that_of_another_process(damaged, caplog):
    place = Place("memory://bucket/run", ts.Context())
    place.write(damaged)
    with pytest.raises(UserError, match="^memory://bucket/run is in use by another process; wait for it"):
        place.claim(lambda: place.write(damaged))  # written again: its owner lives
    (said,) = caplog.messages
    assert " is held by another process; " in said


def test_waiting_ends_when_the_owner_lets_go(place):
    place.write(someone())
    threading.Timer(0.5, place.write, [None]).start()
    begun = time.monotonic()
    assert place.claim().lost == ""
    assert time.monotonic() - begun < LAPSES


def test_waiting_ends_when_it_is_told_to(place):
    place.write(someone())
    asked = []

    def leave():
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.claim(leave)
    assert asked[-1] - asked[0] < LAPSES
    assert json.loads(place.read().value) == someone()


def test_a_store_that_is_silent_for_a_moment_changes_nothing(cloud, server, monkeypatch):
    monkeypatch.setattr(claims, "ANSWERED_WITHIN", 0.3)
    claim = cloud.claim()
    server.down = True
    eventually(lambda: claim._fault)
    server.down = False
    before = cloud.read().stamp.generation
    eventually(lambda: cloud.read().stamp.generation != before)
    time.sleep(LAPSES)
    assert claim.lost == ""


def test_a_store_that_stays_silent_ends_the_claim_before_it_lapses(cloud, server, monkeypatch):
    monkeypatch.setattr(claims, "ANSWERED_WITHIN", 0.3)
    claim = cloud.claim()
    begun = time.monotonic()
    server.down = True
    eventually(lambda: claim.lost)
    assert LAPSES / 2 - RENEWED - 0.3 < time.monotonic() - begun < LAPSES
    assert re.fullmatch(
        f"{cloud.folder} is no longer held: its claim was not renewed for . s .no answer within 0.3 s.", claim.lost
    )
    server.down = False
    lost = claim.lost
    claim.release()
    assert cloud.read().state == "missing" and claim.lost == lost


def test_a_thread_that_hangs_ends_the_claim_too(place, monkeypatch):
    hang = threading.Event()
    claim = place.claim()
    monkeypatch.setattr(claim, "_write", lambda generation: hang.wait(60))
    eventually(lambda: claim.lost)
    assert "was not renewed for" in claim.lost
    hang.set()


@pytest.mark.parametrize("when", ["claiming", "renewing"])
def test_a_write_whose_answer_is_lost_is_ones_own(cloud, server, when):
    """TensorStore asks again, and is told that the condition is not met, since it was met the first time."""
    if when == "claiming":
        server.deaf = 1
    claim = cloud.claim()
    if when == "renewing":
        server.deaf = 1
    eventually(lambda: not server.deaf)
    before = cloud.read().stamp.generation
    eventually(lambda: cloud.read().stamp.generation != before)
    assert claim.lost == ""
    claim.release()
    assert cloud.read().state == "missing"


def test_a_write_that_was_given_up_and_done_later_is_deleted_too(place):
    die(claim := place.claim())
    place.write(someone(claim._owner))
    claim.release()
    assert place.read().state == "missing"


def test_a_store_that_refuses_is_named(server, monkeypatch):
    with pytest.raises(UserError, match="^gs://nobody/run can't be claimed for this process: .*404.*$"):
        Claim("gs://nobody/run")
    monkeypatch.setattr(claims, "ANSWERED_WITHIN", 0.2)
    server.down = True
    try:
        with pytest.raises(UserError, match="^gs://bucket/x can't be claimed for this process: no answer within 0.2 s"):
            Claim("gs://bucket/x")
    finally:
        server.down = False
    with pytest.raises(UserError, match="^nowhere://x can't be claimed for this process: .*unsupported URL scheme"):
        Claim("nowhere://x")


def test_a_claim_lies_in_its_folder_whatever_its_name(server):
    folder = epath.Path("gs://bucket/a b/50%/ü?#")
    held = hold_folder(folder)
    assert isinstance(held, Claim) and "a b/50%/ü?#/.lock" in server.objects
    assert (folder / ".lock").exists()
    held.release()
    assert "a b/50%/ü?#/.lock" not in server.objects


def test_a_folder_on_a_disk_is_locked(tmp_path):
    held = hold_folder(epath.Path(tmp_path))
    assert isinstance(held, Lock) and held.lost == ""
    with pytest.raises(
        UserError, match=f"{tmp_path} is in use by process {os.getpid()} on .*; wait for it, end it, or"
    ):
        hold_folder(epath.Path(tmp_path))
    held.release(remove=True)
    assert not list(tmp_path.iterdir())


def test_a_run_that_loses_its_folder_leaves_it_alone(server, monkeypatch):
    monkeypatch.setattr(claims, "RENEWED_EVERY", RENEWED)
    config = configs.resolve(configs.Config())
    place = Place(f"gs://bucket/{time.time_ns()}", ts.Context())
    with pytest.raises(ZeroDivisionError), RunFolder(place.folder, config, INFO) as folder:
        assert folder.lost == "" and read_config(place.folder) == config
        place.write(someone())
        eventually(lambda: folder.lost)
        assert "process 1 on elsewhere has taken it over" in folder.lost
        folder.append("metrics", {"step": 1})
        _ = 1 / 0
    prefix = place.folder.removeprefix("gs://bucket/")
    assert {name for name in server.objects if name.startswith(prefix)} == {f"{prefix}/.lock", f"{prefix}/config.json"}


def test_a_run_that_fails_before_it_begins_leaves_nothing(server):
    with pytest.raises(ZeroDivisionError), RunFolder("gs://bucket/none", configs.resolve(configs.Config()), INFO):
        _ = 1 / 0
    assert not [name for name in server.objects if name.startswith("none")]


def test_a_run_that_begins_while_another_waits_is_seen(server):
    mine, other = configs.Config(), configs.Config()
    other.training.seed = 3
    place = Place("gs://bucket/meanwhile", ts.Context())
    place.write(someone())

    def begin():
        place.write(None)
        RunFolder(place.folder, configs.resolve(other), INFO).close()

    with pytest.raises(UserError, match="holds a run of another kind: training.seed is 3 there and 0 here"):
        RunFolder(place.folder, configs.resolve(mine), INFO, while_waiting=begin)
    assert read_config(place.folder) == configs.resolve(other) and place.read().state == "missing"


def test_a_run_trains_and_goes_on_in_an_object_store(server, tmp_path, monkeypatch):
    file = commands.write_config(tmp_path)

    def config(steps):
        made = runpy.run_path(str(file))["get_config"]()
        made.training.steps = steps
        return configs.resolve(made)

    monkeypatch.setattr(claims, "RENEWED_EVERY", RENEWED)
    folder = "gs://bucket/runs/one"
    runs.train(config(5), folder)
    assert "runs/one/.lock" not in server.objects
    other = Claim(folder, renewed_every=RENEWED)
    with pytest.raises(UserError, match="^gs://bucket/runs/one is in use by process"):
        runs.train(config(8), folder)
    other.release()
    assert runs.train(config(8), folder)["steps"] == 8
    assert [row["step"] for row in read_rows(folder, "metrics")] == list(range(1, 9))
    assert runs.load(folder).step == 8


BRIEF = f"""
from sparse_lm import cli
from sparse_lm.runs import claim
claim.RENEWED_EVERY, claim.LAPSES_AFTER = {RENEWED}, {3 * LAPSES}
cli.main()
"""


@pytest.mark.slow
def test_a_restart_takes_over_from_a_trainer_that_stands_still(server, tmp_path):
    """While the first runs the second is refused; when it stands still the third takes over; awake, it ends at once."""
    config = commands.write_config(tmp_path, steps=100_000)

    def start(*arguments):
        command = [sys.executable, "-c", BRIEF, "train", f"--config={config}", "--workdir=gs://bucket/runs/two"]
        return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def saved():
        names = (re.fullmatch(r"runs/two/checkpoints/(\d+)/commit_success.txt", name) for name in list(server.objects))
        return [int(name[1]) for name in names if name]

    rows = lambda: read_rows("gs://bucket/runs/two", "metrics")
    first = start()
    try:
        eventually(saved, 300)
        said = commands.finish(start(), 2)
        assert f"gs://bucket/runs/two is in use by process {first.pid} on " in said and "Traceback" not in said
        first.send_signal(signal.SIGSTOP)
        steps = max(saved()) + 2
        said = commands.finish(start(f"--config.training.steps={steps}"))
        assert f"is held by process {first.pid} on " in said
        assert re.search(rf"gs://bucket/runs/two goes on after step {steps - 2}\b", said)
        done = rows()
        assert [row["step"] for row in done] == list(range(1, steps + 1))
        assert "runs/two/.lock" not in server.objects
        first.send_signal(signal.SIGCONT)
        said = commands.finish(first, 1)
        assert "gs://bucket/runs/two is no longer held: " in said
        assert rows() == done
    finally:
        first.kill()
        first.communicate()
