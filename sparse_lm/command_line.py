"""`--config=FILE --config.x.y=value`: a config file and single fields on top of it, with errors in one line."""

import dataclasses
import importlib.util
import pathlib
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from sparse_lm.config import Config
from sparse_lm.errors import UserError, nearest


def load_config(path: str) -> Config:
    """What `get_config()` in a Python file returns. A colon and text after the path are given to it as an argument."""
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
    except Exception as error:
        raise UserError(f"config file {name}: get_config() fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"config file {name}: get_config() returns a {type(config).__name__}, not a sparse_lm.config.Config"
        )
    return config


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config` and the fields that argv sets. Raises `UserError` for a field that does not exist."""
    path = next((m[1] for a in argv if (m := re.fullmatch(r"--?config=(.*)", a))), None)
    if path is None:
        raise UserError("--config=FILE is missing; configs/quickstart.py is the one to begin with")
    config = load_config(path)
    for argument in argv:
        if match := re.match(r"--?(no)?config\.([^=]+)(=.*)?$", argument):
            _check_field(config, match[2])
    config_flags.DEFINE_config_dataclass(
        "config",
        config,
        "config file, a Python file with get_config(); --config.PART.FIELD=VALUE sets a field of it",
        values,
        sys_argv=argv,
        parse_fn=lambda path: config,
        accept_new_attributes=True,  # of the options of a choice, which are checked when it is made
    )


def _check_field(config: Config, path: str) -> None:
    """Raises unless the dotted path leads to a field that can be set."""
    node, so_far = config, "config"
    parts = path.split(".")
    for at, part in enumerate(parts):
        if isinstance(node, ConfigDict):
            return
        names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            where = f"--config.{path}: {so_far} has no field {part!r}"
            raise UserError(where + (nearest(part, names) if names else f"; it is a value, {node!r}"))
        node, so_far = getattr(node, part), f"{so_far}.{part}"
        if at == len(parts) - 1 and (dataclasses.is_dataclass(node) or isinstance(node, ConfigDict)):
            inside = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else ["NAME"]
            raise UserError(f"--config.{path} is a part with fields of its own: {', '.join(inside)}")
