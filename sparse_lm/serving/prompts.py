"""Reads prompts from a folder of text files, or from the lines of a .jsonl file."""

import json

from etils import epath

from sparse_lm.errors import UserError
from sparse_lm.paths import user_path


def read_prompts(path: epath.PathLike, field: str) -> list[tuple[str, str]]:
    """Reads prompts.

    Args:
        path: a folder of .txt files, or a .jsonl file.
        field: of a line of the .jsonl file.

    Returns:
        (name, prompt) of each .txt file, without a line end at its end, or of each line, named FILE:LINE.

    Raises:
        UserError: if there are no prompts, one is not UTF-8, or a line is not JSON or has no text in the field.
    """
    path = user_path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"there are no prompts: {path} does not exist")
    if path.suffix != ".jsonl":
        raise UserError(f"the prompts are a folder of .txt files or a .jsonl file; {path} is neither")
    return _read_jsonl(path, field)


def _read_folder(folder: epath.Path) -> list[tuple[str, str]]:
    files = sorted(folder.glob("*.txt"), key=lambda path: path.name)
    if not files:
        raise UserError(f"there are no prompts: {folder} has no .txt file")
    return [(path.name, _read_text(path).removesuffix("\n").removesuffix("\r")) for path in files]


def _read_jsonl(path: epath.Path, field: str) -> list[tuple[str, str]]:
    prompts = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # a JSON string may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{path}, line {number} has no text in a field {field!r}")
        if any("\ud800" <= character <= "\udfff" for character in row[field]):
            raise UserError(f"{path}, line {number} has half of a surrogate pair in the field {field!r}")
        prompts.append((f"{path.name}:{number}", row[field]))
    if not prompts:
        raise UserError(f"there are no prompts: {path} is empty")
    return prompts


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
