import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.data import tokenizer as tokenizers
from sparse_lm.errors import UserError

TEXTS = [f"the {word} of the {word}s is żółć 🙂\n\tand so on" for word in ("cat", "dog", "house", "tree") * 20]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.from_json(tokenizers.train(TEXTS, 300))


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=80))
def test_decoding_gives_every_text_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()
    assert trained.byte_lengths[ids].sum() == len(text.encode())


def test_the_name_of_the_end_of_text_is_ordinary_text(trained):
    text = "a <|endoftext|> b"
    assert trained.end_of_text not in trained.encode(text)
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode_bytes([trained.end_of_text]) == b""


def test_bytes_of_a_cut_character_come_one_token_at_a_time(trained):
    ids = trained.encode("日")
    assert len(ids) == 3
    assert [trained.decode_bytes([i]) for i in ids] == [bytes([b]) for b in "日".encode()]
    assert trained.decode(ids[:2]) == "\ufffd"


def test_the_vocabulary_is_as_large_as_asked_and_frequent_words_are_tokens(trained):
    assert trained.vocabulary_size == 300
    assert len(trained.encode(" the")) == 1


def test_a_small_text_gives_fewer_tokens_than_asked():
    assert tokenizers.from_json(tokenizers.train(["ab ab"], 5000)).vocabulary_size < 300


def test_training_twice_gives_the_same_bytes(tmp_path):
    code = f"import sys; from sparse_lm.data.tokenizer import train; sys.stdout.buffer.write(train({TEXTS!r}, 300))"
    for threads, seed in (("1", "1"), ("3", "2")):
        env = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed, "PATH": "", "JAX_PLATFORMS": "cpu"}
        made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert made.stdout == tokenizers.train(TEXTS, 300)
        assert made.stderr == b""


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="model.vocabulary is 100; .* at least 257"):
        tokenizers.train(TEXTS, 100)


def test_a_saved_tokenizer_is_the_same(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(trained.file)
    again = tokenizers.load(str(tmp_path / "tokenizer.json"))
    assert again.digest == trained.digest
    assert again.encode(TEXTS[0]) == trained.encode(TEXTS[0])


def test_a_piece_tokenizer_with_byte_tokens_gives_the_text_back(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁", "c", "a", "t"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    tokenizer = tokenizers.load(str(path))
    assert tokenizer.end_of_text == 1
    assert tokenizer.decode(tokenizer.encode("cat ü")) == "cat ü"


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_prefix=str(folder / "m"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    return str(folder / "m.model")


def test_a_sentence_piece_model_is_read_as_its_own_library_reads_it(piece_model):
    import sentencepiece

    tokenizer = tokenizers.load(piece_model)
    own = sentencepiece.SentencePieceProcessor(model_file=piece_model)
    for text in (TEXTS[0].splitlines()[0], "日本 cats", "a </s> b"):
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == own.decode(own.encode(text))
    assert tokenizer.end_of_text == own.eos_id() not in tokenizer.encode("a </s> b")
    assert tokenizer.vocabulary_size == own.get_piece_size()


def test_a_sentence_piece_model_without_the_package_says_what_to_install(piece_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        tokenizers.load(piece_model)


def bad_files():
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    empty |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    word_level = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}
    no_end = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    return [
        ("a.json", b"{]", "not a tokenizer.json"),
        ("b.model", b"no model", "not a SentencePiece model"),
        ("c.json", json.dumps(empty | {"model": word_level}).encode(), "neither byte-level nor"),
        ("d.json", json.dumps(empty | {"model": no_end}).encode(), "no end-of-text token"),
    ]


@pytest.mark.parametrize("name, content, message", bad_files())
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizers.load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="no/such.json.* can't be read: No such file"):
        tokenizers.load("no/such.json")


def changed(trained, change) -> bytes:
    description = json.loads(trained.file)
    change(description)
    return json.dumps(description).encode()


def with_end(name: str, *others: str):
    def change(description):
        vocabulary = description["model"]["vocab"]
        vocabulary[name] = vocabulary.pop("<|endoftext|>")
        token = description["added_tokens"][0]
        names = [name, *others]
        vocabulary |= {other: len(vocabulary) + i for i, other in enumerate(others)}
        description["added_tokens"] = [token | {"id": vocabulary[one], "content": one} for one in names]

    return change


@pytest.mark.parametrize(
    "name, others",
    [
        ("<｜end▁of▁sentence｜>", ("<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>")),  # DeepSeek
        ("<EOS_TOKEN>", ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>")),  # Cohere
        ("[EOS]", ("[BOS]", "[EOT]", "[PAD]")),  # Kimi
    ],
)
def test_a_special_token_that_calls_itself_an_end_is_one(trained, name, others):
    found = tokenizers.from_json(changed(trained, with_end(name, *others)))
    assert found.end_of_text == trained.end_of_text and found.pieces[found.end_of_text] == b""
    assert found.end_of_text not in found.encode(f"a {name} b")


def test_two_that_do_are_refused(trained):
    with pytest.raises(UserError, match="2 special tokens that call themselves an end"):
        tokenizers.from_json(changed(trained, with_end("[EOS]", "<EOD>")))


def test_encoding_leaves_nothing_to_chance(trained):
    dropping = tokenizers.from_json(changed(trained, lambda d: d["model"].update(dropout=0.5)))
    text = TEXTS[0] * 5
    assert all(dropping.encode(text) == trained.encode(text) for _ in range(20))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d["model"]["vocab"].update({"日本": 300}), "its token '日本' does not stand for bytes"),
        (
            lambda d: d["model"]["vocab"].update({"x" * 9: 400_000_000}),
            "ids up to 400000000; from 0 to below 16,777,216",
        ),
    ],
)
def test_a_vocabulary_that_can_not_be_used_is_refused(trained, change, words):
    with pytest.raises(UserError, match=words):
        tokenizers.from_json(changed(trained, change))


def test_a_piece_that_only_looks_like_a_byte_is_text():
    assert tokenizers._piece_bytes("<0xZZ>") == b"<0xZZ>" and tokenizers._piece_bytes("<0x0A>") == b"\n"
