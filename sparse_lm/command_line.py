"""The flags `--config=FILE` and `--config.x.y=value`: a config file, and fields that override it."""

import ast
import contextlib
import dataclasses
import importlib.util
import pathlib
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from sparse_lm.config import Config, flatten_fields, from_dict, to_dict
from sparse_lm.errors import UserError, suggest

TEXTS = [f"config.{path}" for path, value in flatten_fields(to_dict(Config())).items() if isinstance(value, list)]


def load_config(path: str) -> Config:
    """Loads a config from a Python file.

    Args:
        path: the file; in "FILE:TEXT" the text is passed to its `get_config` as an argument.

    Returns:
        What `get_config()` returns.

    Raises:
        UserError: for a missing file, one that fails, or one that returns no `Config`.
    """
    name, *argument = path.split(":", 1)
    file = pathlib.Path(name)
    if not file.is_file():
        raise UserError(f"config file {name} does not exist")
    spec = importlib.util.spec_from_loader("config_file", loader=None, origin=name)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    try:
        exec(compile(file.read_text(encoding="utf-8"), name, "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserError(f"config file {name} is not Python: line {error.lineno}: {error.msg}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"config file {name} is not Python: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {name} fails: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"config file {name} lacks get_config(), which returns a sparse_lm.config.Config")
    try:
        config = module.get_config(*argument)
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {name}: get_config() fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"config file {name}: get_config() returns a {type(config).__name__}, not a sparse_lm.config.Config"
        )
    return from_dict(to_dict(config), f"config file {name}")


def quote_text(argument: str) -> str:
    """An argument that sets a field of several texts, such that its value is one of them, commas and spaces included.

    A list as Python writes it stays one.
    """
    flag, equals, value = argument.partition("=")
    if flag.lstrip("-") not in TEXTS or not equals:
        return argument
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        if isinstance(ast.literal_eval(value), tuple | list | str):
            return argument
    return f"{flag}={value!r}"


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config` and the fields that argv sets.

    Args:
        values: where the flags are defined.
        argv: the command line, of which `--config=FILE` names the config file.

    Raises:
        UserError: for a missing or invalid config file, or an unknown field.
    """
    path = next((m[1] for a in argv if (m := re.fullmatch(r"--?config=(.*)", a))), None)
    if path is None:
        raise UserError("--config=FILE is missing; configs/quickstart.py is the one to begin with")
    config = load_config(path)
    for argument in argv:
        if match := re.match(r"--?(no)?config\.([^=]*)(=.*)?$", argument, re.DOTALL):
            _check_field(config, match[2])
    config_flags.DEFINE_config_dataclass(
        "config",
        config,
        "config file, a Python file with get_config(); --config.PART.FIELD=VALUE sets a field of it",
        values,
        sys_argv=argv,
        parse_fn=lambda path: config,
        accept_new_attributes=True,  # for the options of a choice, which `registry.create` checks
    )


def _check_field(config: Config, path: str) -> None:
    """Raises `UserError` unless the dotted path leads to a field that can be set."""
    node, parent = config, "config"
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ConfigDict):
            if depth < len(parts) - 1 or not part.isidentifier():
                raise UserError(f"--config.{path}: an option is written --config.{'.'.join(parts[:depth])}.NAME=VALUE")
            return
        names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            problem = f"--config.{path}: {parent} has no field {part!r}"
            raise UserError(problem + (suggest(part, names) if names else f"; it is a value, {node!r}"))
        node, parent = getattr(node, part), f"{parent}.{part}"
        if depth == len(parts) - 1 and (dataclasses.is_dataclass(node) or isinstance(node, ConfigDict)):
            fields = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else ["NAME"]
            raise UserError(f"--config.{path} is a part with fields of its own: {', '.join(fields)}")
