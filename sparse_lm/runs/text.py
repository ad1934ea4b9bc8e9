"""The tokenizer that a run's folder holds, and text prepared with it: that of the run's training, or other text."""

import dataclasses

from etils import epath

from sparse_lm import config as configs
from sparse_lm import data
from sparse_lm.data import tokenizer as tokenizers
from sparse_lm.errors import UserError
from sparse_lm.paths import user_path
from sparse_lm.runs.folder import TOKENIZERS, RunFolder, read_info


def find_tokenizer(path: epath.PathLike) -> str:
    """The tokenizer's file in a run's folder, "" where there is no run, or none yet."""
    folder = user_path(path)
    files = [folder / name for name in TOKENIZERS] if (folder / "config.json").exists() else []
    return next((str(file) for file in files if file.exists()), "")


def choose_tokenizer(config: configs.Config, path: epath.PathLike, parent: str = "") -> str:
    """The file of the tokenizer that the run in a folder has or, where it is new, will have; "": trained on its text.

    A run keeps the one that it began with. A new one takes the one that its config names, otherwise that of the run it
    begins from, whose parameters mean those tokens.

    Args:
        config: names a tokenizer, or none.
        path: the run's folder, which need not exist yet.
        parent: the folder of the run that it begins from, if any.

    Raises `UserError` where the config names another tokenizer than the run has.
    """
    named, kept = config.data.tokenizer, find_tokenizer(path)
    if not kept:
        return named or (_tokenizer_file(parent) if parent else "")
    if named and _differ(named, kept):
        raise UserError(f"{path} holds a run with another tokenizer than data.tokenizer={named}; unset, it goes on")
    return kept


def keep_tokenizer(folder: RunFolder, tokenizer: data.Tokenizer, file: str) -> None:
    """Stores the tokenizer that was loaded from a file in the run's folder, unless it is there."""
    if folder.primary and not find_tokenizer(folder.path):
        folder.keep("tokenizer.model" if epath.Path(file).suffix == ".model" else "tokenizer.json", tokenizer.file)


def load_tokenizer(path: epath.PathLike) -> data.Tokenizer:
    """The tokenizer of the run in a folder. Raises `UserError` where there is none."""
    return tokenizers.load(_tokenizer_file(path))


def with_tokenizer(config: configs.Config, file: str) -> configs.Config:
    """The config with another tokenizer, to prepare text with."""
    return configs.resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=file)))


def prepare_own(config: configs.Config, path: epath.PathLike, instead: str = "bring it back") -> data.Corpus:
    """The text that the run in a folder was trained on.

    Args:
        config: the run's.
        path: its folder.
        instead: what is to be done where the text is gone, for the message.

    Raises `UserError` where the text can't be read, and where it is not what it was.
    """
    own = with_tokenizer(config, _tokenizer_file(path))
    try:
        corpus = data.prepare(own)
    except UserError as error:
        raise UserError(f"this needs the text that {path} was trained on: {error}; {instead}") from error
    if corpus.fingerprint != (stored := read_info(path)["fingerprint"]):
        raise UserError(
            f"this needs the text that {path} was trained on, and it has changed: its fingerprint was {stored} and is "
            f"{corpus.fingerprint} now; {instead}"
        )
    return corpus


def prepare_other(config: configs.Config, path: epath.PathLike, sources: tuple[str, ...]) -> data.Corpus:
    """Other text, with the tokenizer of the run in a folder; sources are written as `config.data.sources`."""
    own = with_tokenizer(config, _tokenizer_file(path))
    return data.prepare(configs.resolve(dataclasses.replace(own, data=dataclasses.replace(own.data, sources=sources))))


def _tokenizer_file(path: epath.PathLike) -> str:
    if file := find_tokenizer(path):
        return file
    raise UserError(f"{path} holds no tokenizer; a run keeps one, as {' or '.join(TOKENIZERS)}, before its first step")


def _differ(one: str, other: str) -> bool:
    """Whether both files can be read and are not the same: a run does not need the file that it took its own from."""
    try:
        return user_path(one).read_bytes() != user_path(other).read_bytes()
    except OSError:
        return False
