"""A prepared TFDS data set by name, read without TensorFlow."""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from sparse_lm.data.documents import Document
from sparse_lm.errors import UserError, one_line, suggest
from sparse_lm.paths import user_path

# The packages that the command line of TFDS imports.
ENVIRONMENT = (
    "python -m venv tfds-env && tfds-env/bin/pip install tensorflow tensorflow-datasets apache-beam mlcroissant "
    "importlib_resources && tfds-env/bin/tfds"
)
KINDS = ("train", "validation", "test")


@dataclass
class TfdsSet:
    """The train, validation and test splits of a data set. Where it has no validation, that is drawn from train, and
    test too."""

    path: str  # name of the data set: lm1b, c4/en, c4/en:3.1.0
    field: str = "text"  # the feature that holds the text
    data_dir: str = ""  # "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    left_out = ""

    def __post_init__(self):
        self.name = re.sub(r"\W+", "_", self.path, flags=re.ASCII).strip("_") or "tfds"

    def fingerprint(self) -> str:
        folder = epath.Path(self._builder.data_path)
        files = [(path.name, path.stat().length) for split in self._splits for path in self._list_files(split)]
        parts = [self.field, self._builder.info.full_name, files, (folder / "dataset_info.json").read_text()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for split in self._splits:
            kind = split if "validation" in self._splits else "" if split == "train" else split
            with self._explain_damage(f"its split {split}"):
                records = self._builder.as_data_source(split)
            for index in range(len(records)):
                with self._explain_damage(f"record {index} of {split}"):
                    text = records[index][self.field].decode()
                yield Document(text, kind)

    @contextlib.contextmanager
    def _explain_damage(self, what: str) -> Iterator[None]:
        """Names what can't be read, on one line: of a damaged file, TFDS and ArrayRecord raise errors of any kind."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError(f"tfds:{self.path}: {what} is not UTF-8 at byte {error.start}") from error
        except (UserError, OSError, MemoryError, tfds.core.registered.DatasetNotFoundError):
            raise
        except Exception as error:
            raise UserError(f"tfds:{self.path}: {what} can't be read: {one_line(error)}") from error

    @property
    def _splits(self) -> list[str]:
        return [split for split in KINDS if split in self._builder.info.splits]

    def _list_files(self, split: str) -> list[epath.Path]:
        return [epath.Path(path) for path in self._builder.info.splits[split].filepaths]

    @cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        data_dir = self.data_dir or str(tfds.core.constants.DATA_DIR)
        _check_features(user_path(data_dir) / re.split("[:/]", self.path)[0])
        try:
            with self._explain_damage(f"its description in {data_dir}"):
                builder = tfds.core.read_only_builder.builder_from_files(self.path, data_dir=data_dir)
        except tfds.core.registered.DatasetNotFoundError:
            raise UserError(self._explain_missing(data_dir)) from None
        # A data set converted in place has files of both formats, and its description still names the old one.
        builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
        if "train" not in builder.info.splits:
            raise UserError(f"tfds:{self.path} has no split 'train'; it has: {', '.join(sorted(builder.info.splits))}")
        splits = [builder.info.splits[split] for split in KINDS if split in builder.info.splits]
        if not all(epath.Path(path).exists() for split in splits for path in split.filepaths):
            raise UserError(
                f"tfds:{self.path} is not stored as ArrayRecord in {builder.data_path}; convert it in an environment "
                f"of its own: {ENVIRONMENT} convert_format --dataset_version_dir={builder.data_path} "
                "--out_file_format=array_record"
            )
        texts = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
        if self.field not in texts:
            hint = suggest(self.field, texts) if texts else "; it has no texts"
            raise UserError(f"tfds:{self.path}: no text feature {self.field!r}{hint} (set it with ?field=NAME)")
        return builder

    def _explain_missing(self, data_dir: str) -> str:
        # Without TensorFlow, TFDS lists some builders only after their modules are imported.
        import tensorflow_datasets.text  # noqa: F401

        known = tfds.list_builders(with_community_datasets=False)
        name = re.split("[/:]", self.path)[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            return f"tfds:{self.path} is neither prepared in {data_dir} nor known to TFDS{hint}"
        return (
            f"tfds:{self.path} is not prepared in {data_dir}; prepare it in an environment of its own: "
            f"{ENVIRONMENT} build {self.path} --data_dir={data_dir} --file_format=array_record"
        )


def _check_features(folder: epath.Path) -> None:
    """Raises `UserError` where a data set's features would run code that is not the library's own."""
    for file in (*folder.glob("*/features.json"), *folder.glob("*/*/features.json")):  # with and without a config
        try:
            features = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        for name in _class_names(features):
            if not re.fullmatch(r"tensorflow_datasets\.core\.features\.[\w.]+", str(name)):
                raise UserError(f"{file} names the feature {name!r}; only those of tensorflow_datasets can be read")


def _class_names(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inside in value.items():
            if key in ("pythonClassName", "python_class_name", "type") and not isinstance(inside, dict):
                yield inside  # a dict is that of a feature with this name
            yield from _class_names(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _class_names(inside)
