"""Generation in text: prompts and continuations as strings, one at a time or a folder at once."""

import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
from etils import epath

from sparse_lm.errors import UserError
from sparse_lm.serving.generate import Generator
from sparse_lm.serving.prompts import read_prompts


@runtime_checkable
class Tokenizer(Protocol):
    """What generation needs of a tokenizer. The bytes of a list of ids are those of its parts, one after the other."""

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


def stream_text(
    generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[list[str]]:
    """What each step adds to each prompt's text, "" where a row has ended or a character is not complete yet.

    Joined, a row's pieces are its continuation; bytes that are not UTF-8 become U+FFFD.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    for step in generator.stream([tokenizer.encode(prompt) for prompt in prompts], seeds):
        yield [d.decode(b"" if id is None else tokenizer.decode_bytes([id])) for d, id in zip(decoders, step)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def warn_beyond_training(tokens: int, length: int) -> str | None:
    """A warning where prompt and continuation have more tokens than the rows of `length` a model was trained on."""
    if tokens <= length:
        return None
    return f"prompt and continuation have {tokens} tokens; the model was trained on {length}, and may fail beyond them"


def generate_folder(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: epath.PathLike,
    out: epath.PathLike,
    *,
    field: str = "prompt",
    seed: int = 0,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Continues every prompt of a folder of .txt files, or of a .jsonl file's `field`, and writes one .jsonl file.

    Its rows, in the order of `read_prompts`, are prompt_file, prompt, text (the continuation), tokens (its ids),
    prompt_tokens (their number in the prompt) and ended (whether the text came to its end before max_tokens). `out`
    appears when it is complete, and replaces what was there. `batch` prompts are continued at once; progress is told
    how many of all are done.

    Returns the number of tokens of the longest prompt with its continuation, for `beyond_training`. Raises `UserError`
    as `read_prompts` does, and where `out` can't be written.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    out = epath.Path(out).expanduser()
    if out.is_dir():
        raise UserError(f"{out} is a folder; the continuations go into a file")
    named = read_prompts(prompts, field)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    writes = jax.process_index() == 0
    if writes:
        _write(unfinished, "")  # what can't be written is to be told now, not after the work
    try:
        rows = _continue_prompts(generator, tokenizer, named, seed, batch, progress)
        if writes:
            _write(unfinished, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            unfinished.replace(out)
    finally:
        if writes:
            unfinished.unlink(missing_ok=True)
    return max(row["prompt_tokens"] + len(row["tokens"]) for row in rows)


def _continue_prompts(generator, tokenizer, named, seed, batch, progress) -> list[dict]:
    ids = [tokenizer.encode(prompt) for _, prompt in named]
    rows: list[dict] = [{}] * len(named)
    alike = sorted(range(len(named)), key=lambda i: len(ids[i]))  # in length, so that little is padded
    for start in range(0, len(alike), batch):
        some = alike[start : start + batch]
        for i, tokens in zip(some, generator.generate([ids[i] for i in some], [seed] * len(some))):
            rows[i] = {
                "prompt_file": named[i][0],
                "prompt": named[i][1],
                "text": tokenizer.decode_bytes(tokens).decode("utf-8", "replace"),
                "tokens": tokens,
                "prompt_tokens": len(ids[i]),
                "ended": len(tokens) < generator.max_tokens,
            }
        progress(start + len(some), len(alike))
    return rows


def _write(path: epath.Path, text: str) -> None:
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise UserError(f"the continuations can't be written to {path.parent}: {error.strerror}") from error
