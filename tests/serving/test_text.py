import errno
import json

import jax
import pytest
from etils import epath

from sparse_lm.config import Config, Data, Model, Training, resolve
from sparse_lm.errors import UserError
from sparse_lm.models import functional
from sparse_lm.serving import Generator, Sampling, generate_folder, stream_text, warn_beyond_training

END = 256


class Bytes:
    """A token for each byte."""

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


class Scripted(Generator):
    """Continues the prompts that it knows, in the batches that it writes down."""

    def __init__(self, script: dict[str, bytes], max_tokens: int = 100):
        self.script, self.max_tokens, self.batches = script, max_tokens, []

    def stream(self, prompts, seeds):
        prompts = [bytes(prompt).decode() for prompt in prompts]
        self.batches.append((prompts, seeds))
        texts = [self.script[prompt][: self.max_tokens] for prompt in prompts]
        for at in range(max(map(len, texts))):
            yield [text[at] if at < len(text) else None for text in texts]


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_characters_of_several_tokens_come_whole():
    texts = {"p": "aé漢🙂z".encode(), "q": b"ok"}
    steps = list(stream_text(Scripted(texts), Bytes(), ["p", "q"], [0, 0]))
    assert [p for p, _ in steps] == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "z", ""]
    assert [q for _, q in steps] == ["o", "k"] + [""] * 10


@pytest.mark.parametrize("raw", [b"a\xc3", b"\xffb", "🙂".encode()[:3], b"\xe6\xbcx", "é".encode() + b"\x80"])
def test_bytes_that_are_no_character_become_a_mark_in_a_stream_as_in_the_whole(raw):
    streamed = "".join(piece for (piece,) in stream_text(Scripted({"p": raw}), Bytes(), ["p"], [0]))
    assert streamed == raw.decode("utf-8", "replace") and "\ufffd" in streamed


def test_what_is_longer_than_the_training_rows_is_told():
    assert warn_beyond_training(256, 256) is None
    assert "257 tokens" in warn_beyond_training(257, 256) and "trained on 256" in warn_beyond_training(257, 256)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "prompts"
    made.mkdir()
    for name, text in {"1": "a long one", "2": "ü", "3": "mid"}.items():
        (made / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return made


SCRIPT = {"a long one": b"xyz!", "ü": "ö".encode(), "mid": b""}


def test_a_folder_becomes_one_file_in_the_order_of_the_names(folder, tmp_path):
    generator, told = Scripted(SCRIPT, max_tokens=3), []
    out = tmp_path / "out.jsonl"
    longest = generate_folder(generator, Bytes(), folder, out, seed=7, batch=2, progress=lambda *n: told.append(n))
    assert rows(out) == [
        dict(
            prompt_file="1.txt", prompt="a long one", text="xyz", tokens=[120, 121, 122], prompt_tokens=10, ended=False
        ),
        dict(prompt_file="2.txt", prompt="ü", text="ö", tokens=[0xC3, 0xB6], prompt_tokens=2, ended=True),
        dict(prompt_file="3.txt", prompt="mid", text="", tokens=[], prompt_tokens=3, ended=True),
    ]
    assert generator.batches == [(["ü", "mid"], [7, 7]), (["a long one"], [7])]  # alike in length
    assert longest == 13 and told == [(2, 3), (3, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts"]


def test_a_jsonl_file_goes_in_too_and_what_was_there_is_replaced(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"q": "mid"}\n{"q": "a long one"}\n')
    out.write_text("old")
    generate_folder(Scripted(SCRIPT), Bytes(), str(source), str(out), field="q")
    assert [(row["prompt_file"], row["text"]) for row in rows(out)] == [("in.jsonl:1", ""), ("in.jsonl:2", "xyz!")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_work_leaves_what_was_there(folder, tmp_path, error):
    class Broken(Scripted):
        def stream(self, prompts, seeds):
            if self.batches:
                raise error
            yield from super().stream(prompts, seeds)

    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(error):
        generate_folder(Broken(SCRIPT), Bytes(), folder, out, batch=1)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts"]


def test_where_nothing_can_be_written_is_told_before_the_work(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out, words in [
        (tmp_path, "is a folder; the continuations go into a file"),
        (tmp_path / "none" / "out.jsonl", "can't be written to .*none: No such file or directory"),
        (tmp_path / "file" / "out.jsonl", "can't be written to .*file: Not a directory"),
    ]:
        generator = Scripted(SCRIPT)
        with pytest.raises(UserError, match=words):
            generate_folder(generator, Bytes(), folder, out)
        assert not generator.batches
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "prompts"]
    with pytest.raises(UserError, match="batch is 0; it must be at least 1"):
        generate_folder(Scripted(SCRIPT), Bytes(), folder, tmp_path / "out.jsonl", batch=0)


def test_a_full_disk_is_told_and_leaves_nothing(folder, tmp_path, monkeypatch):
    out = epath.Path(tmp_path / "out.jsonl")
    write = type(out).write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        if data:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(out), "write_bytes", full)
    with pytest.raises(UserError, match="can't be written to .*: No space left on device"):
        generate_folder(Scripted(SCRIPT), Bytes(), folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_a_model_continues_a_folder_as_it_continues_each_text_alone(folder, tmp_path):
    model = Model(vocabulary=260, width=16, layers=2, experts=2)
    config = resolve(Config(model=model, data=Data(length=16), training=Training(batch=1)))
    fns = functional(config.model)
    generator = Generator(
        config.model,
        fns.init(jax.random.key(0)),
        fns.init_router_state(),
        end_of_text=END,
        max_tokens=6,
        sampling=Sampling(0.9, 50, 0.95),
        vocabulary=END,
    )
    out = tmp_path / "out.jsonl"
    generate_folder(generator, Bytes(), folder, out, seed=5)
    for row in rows(out):
        assert "".join(piece for (piece,) in stream_text(generator, Bytes(), [row["prompt"]], [5])) == row["text"]
        assert len(row["tokens"]) == 6
