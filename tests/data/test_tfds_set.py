import json
import re
import shlex
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sparse_lm.data.tfds_set import TfdsSet
from sparse_lm.errors import UserError


class TinyStories(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("all", "train_only", "train_test", "no_train")]

    def _info(self):
        features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        splits = {"all": ("train", "validation", "test"), "train_only": ("train",), "train_test": ("train", "test")}
        return {split: self._examples(split) for split in splits.get(self.builder_config.name, ("test",))}

    def _examples(self, split):
        for i in range(5):
            yield i, {"text": f"{split} story {i} ü", "title": f"title {i}", "n": i}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for config in TinyStories.BUILDER_CONFIGS:
        TinyStories(data_dir=folder, config=config, file_format="array_record").download_and_prepare()
    return str(folder)


def test_splits_and_texts_are_those_of_the_set(data_dir):
    documents = list(TfdsSet("tiny_stories/all", data_dir=data_dir).documents())
    assert sorted(documents) == sorted(
        (f"{split} story {i} ü", split, "") for split in ("train", "validation", "test") for i in range(5)
    )


def test_missing_splits_are_left_to_the_hash(data_dir):
    assert {d.kind for d in TfdsSet("tiny_stories/train_only", data_dir=data_dir).documents()} == {""}
    kinds = {d.text.split()[0]: d.kind for d in TfdsSet("tiny_stories/train_test", data_dir=data_dir).documents()}
    assert kinds == {"train": "", "test": "test"}


def test_another_feature_and_a_version(data_dir):
    reader = TfdsSet("tiny_stories/all:1.2.0", field="title", data_dir=data_dir)
    assert {d.text for d in reader.documents()} == {f"title {i}" for i in range(5)}
    assert reader.name == "tiny_stories_all_1_2_0"


def test_the_key_depends_on_set_and_feature(data_dir):
    keys = [TfdsSet(f"tiny_stories/{name}", data_dir=data_dir).fingerprint() for name in ("all", "all", "train_only")]
    assert keys[0] == keys[1] != keys[2]
    assert TfdsSet("tiny_stories/all", field="title", data_dir=data_dir).fingerprint() != keys[0]


def message(path, data_dir, **options):
    with pytest.raises(UserError) as error:
        list(TfdsSet(path, data_dir=data_dir, **options).documents())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["lm1b", "c4/en:3.1.0"])
def test_a_set_that_is_not_prepared_is_answered_with_the_command(tmp_path, name):
    told = message(name, str(tmp_path))
    assert f"tfds:{name} is not prepared in {tmp_path}" in told
    command = shlex.split(told.split("own: ")[1])
    assert command[-4:] == ["build", name, f"--data_dir={tmp_path}", "--file_format=array_record"]


def test_an_unknown_set(tmp_path):
    assert "nor known to TFDS; did you mean 'lm1b'?" in message("lm1bb", str(tmp_path))


def test_a_set_stored_otherwise_is_answered_with_the_command(data_dir, tmp_path):
    # A description of TFRecord files is all that it takes to be told; TensorFlow would be needed to write them.
    source = TinyStories(data_dir=data_dir, config="all").data_path
    target = tmp_path / "tiny_stories" / "all" / "1.2.0"
    target.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        (target / name).write_text((source / name).read_text().replace("array_record", "tfrecord"))
    told = message("tiny_stories/all", str(tmp_path))
    assert re.search(f"convert_format --dataset_version_dir={target} --out_file_format=array_record$", told)
    # Converted in place, it has both kinds of files under the old description.
    for path in source.glob("*array_record*"):
        (target / path.name).write_bytes(path.read_bytes())
    assert len(list(TfdsSet("tiny_stories/all", data_dir=str(tmp_path)).documents())) == 15


def test_a_feature_that_is_no_text(data_dir):
    assert "no text feature 'txt'; did you mean 'text'" in message("tiny_stories/all", data_dir, field="txt")
    assert "no text feature 'n'" in message("tiny_stories/all", data_dir, field="n")


def test_a_set_without_a_training_split(data_dir):
    assert "has no split 'train'; it has: test" in message("tiny_stories/no_train", data_dir)


@pytest.mark.parametrize("name", ["evil.X", "tensorflow_datasets.core.features.../evil", "os.system", 3])
def test_features_that_are_not_the_librarys_own_are_not_built(data_dir, tmp_path, name):
    shutil.copytree(f"{data_dir}/tiny_stories", tmp_path / "tiny_stories")
    file = tmp_path / "tiny_stories/all/1.2.0/features.json"
    description = json.loads(file.read_text())
    description["featuresDict"]["features"]["text"]["pythonClassName"] = name
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match="only those of tensorflow_datasets can be read"):
        TfdsSet("tiny_stories/all", data_dir=str(tmp_path)).fingerprint()


def test_a_feature_may_be_called_type(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/tiny_stories", tmp_path / "tiny_stories")
    file = tmp_path / "tiny_stories/all/1.2.0/features.json"
    description = json.loads(file.read_text())
    features = description["featuresDict"]["features"]
    features["type"] = features.pop("title")
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match="no text feature 'titel'"):  # past the check of the features
        TfdsSet("tiny_stories/all", data_dir=str(tmp_path), field="titel").fingerprint()


@pytest.mark.parametrize(
    "file", ["features.json", "dataset_info.json", "tiny_stories-train.array_record-00000-of-00001"]
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"{}", b'"x"', b'{"a":' * 20_000, b"half"]
)
def test_a_damaged_set_is_named_on_one_line(data_dir, tmp_path, file, content):
    shutil.copytree(f"{data_dir}/tiny_stories", tmp_path / "tiny_stories")
    damaged = tmp_path / "tiny_stories/all/1.2.0" / file
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    said = message("tiny_stories/all", str(tmp_path))
    assert any(words in said for words in ("can't be read", "is not UTF-8", f"{damaged} is not JSON"))
