"""Continues prompts given as strings: streamed, or a whole folder of them at once."""

import codecs
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
from etils import epath

from sparse_lm.errors import UserError
from sparse_lm.paths import user_path
from sparse_lm.serving.generate import Generator
from sparse_lm.serving.prompts import read_prompts


@runtime_checkable
class Tokenizer(Protocol):
    """The tokenizer that generation needs. The bytes of ids are the concatenated bytes of each id."""

    def encode(self, text: str) -> list[int]: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


def stream_text(
    generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[list[str]]:
    """Yields the text that each step adds to each prompt: "" if a row has ended or a character is incomplete.

    The pieces of a row add up to its continuation; bytes that are not UTF-8 become U+FFFD.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
    for step in generator.stream([tokenizer.encode(prompt) for prompt in prompts], seeds):
        yield [d.decode(b"" if id is None else tokenizer.decode_bytes([id])) for d, id in zip(decoders, step)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]


def warn_beyond_training(tokens: int, length: int) -> str | None:
    """Returns a warning if prompt and continuation have more tokens than the rows a model was trained on, else None."""
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
    """Continues the prompts of a folder or file, and writes a .jsonl file.

    Its rows, in the order of `read_prompts`, hold prompt_file, prompt, text (the continuation), tokens (its ids),
    prompt_tokens (length of the prompt) and ended (whether end_of_text came before max_tokens). The file is complete or
    does not exist; an old one is replaced.

    Args:
        prompts: a folder of .txt files, or a .jsonl file.
        out: the file to write.
        field: of the .jsonl file.
        seed: of all continuations.
        batch: prompts that are continued at once.
        progress: called with the number of prompts done and of all.

    Returns:
        The most tokens of a prompt and its continuation, for `warn_beyond_training`.

    Raises:
        UserError: as `read_prompts` does, or if `out` can't be written.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    out = user_path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; the continuations go into a file")
    named = read_prompts(prompts, field)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    is_writer = jax.process_index() == 0
    if is_writer:
        _write(unfinished, "")  # raises before the work if it can't be written
    try:
        rows = _continue_prompts(generator, tokenizer, named, seed, batch, progress)
        if is_writer:
            _write(unfinished, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            unfinished.replace(out)
    finally:
        if is_writer:
            unfinished.unlink(missing_ok=True)
    return max(row["prompt_tokens"] + len(row["tokens"]) for row in rows)


def _continue_prompts(generator, tokenizer, named, seed, batch, progress) -> list[dict]:
    ids = [tokenizer.encode(prompt) for _, prompt in named]
    rows: list[dict] = [{}] * len(named)
    by_length = sorted(range(len(named)), key=lambda i: len(ids[i]))  # so that little is padded
    for start in range(0, len(by_length), batch):
        indices = by_length[start : start + batch]
        for i, tokens in zip(indices, generator.generate([ids[i] for i in indices], [seed] * len(indices))):
            rows[i] = {
                "prompt_file": named[i][0],
                "prompt": named[i][1],
                "text": tokenizer.decode_bytes(tokens).decode("utf-8", "replace"),
                "tokens": tokens,
                "prompt_tokens": len(ids[i]),
                "ended": len(tokens) < generator.max_tokens,
            }
        progress(start + len(indices), len(by_length))
    return rows


def _write(path: epath.Path, text: str) -> None:
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise UserError(f"the continuations can't be written to {path.parent}: {error.strerror}") from error
