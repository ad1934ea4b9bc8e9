"""Tokenizers: byte-level BPE trained on the corpus, or one loaded from a file."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from sparse_lm.errors import UserError
from sparse_lm.paths import user_path

# If it is unset, the library warns whenever a process that has used its threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as HuggingFaceTokenizer  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
# Names of the token between documents in published tokenizers; the first one found is used. Otherwise it is the special
# token that calls itself an end, if there is one alone.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")
END_NAME = re.compile(r"\W*(eos|eod|end\W?of\W?(text|sentence|document|sequence))(\W?token)?\W*", re.IGNORECASE)
MOST_IDS = 1 << 24
SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes text. Names of special tokens in a text are ordinary text: only packing adds end_of_text.

    Attributes:
        encode_batch: texts to token ids.
        pieces: the bytes of each token; b"" for special ones.
        end_of_text: the id of the token between documents.
        file: tokenizer.json, or a SentencePiece model.
        leading_space: whether encoding adds a space before a text, which decoding removes.
    """

    encode_batch: Callable[[list[str]], list[list[int]]]
    pieces: list[bytes]
    end_of_text: int
    file: bytes
    leading_space: bool = False

    def __post_init__(self):
        lengths = np.array([len(piece) for piece in self.pieces], np.int32)
        object.__setattr__(self, "byte_lengths", lengths)  # int32 [V]
        object.__setattr__(self, "digest", hashlib.sha256(self.file).hexdigest()[:16])

    @property
    def vocabulary_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Concatenates the bytes of tokens, each of which may be a part of a character."""
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes tokens to text, with U+FFFD for bytes that are not UTF-8."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.leading_space else text


def train(texts: Iterable[str], vocabulary: int) -> bytes:
    """Trains a byte-level BPE of at most `vocabulary` tokens, deterministically; returns its tokenizer.json.

    Raises:
        UserError: for a vocabulary too small for the 256 bytes and the end of text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary <= len(alphabet):
        raise UserError(f"model.vocabulary is {vocabulary}; a byte-level tokenizer needs at least {len(alphabet) + 1}")
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


def load(path: str) -> Tokenizer:
    """Loads a tokenizer.json or a SentencePiece .model.

    Raises:
        UserError: for a missing or invalid file, a tokenizer without an end-of-text token, or a SentencePiece model
            where the package that reads it is missing.
    """
    expanded = user_path(path)
    try:
        file = expanded.read_bytes()
    except OSError as e:
        raise UserError(f"data.tokenizer {path!r} can't be read: {e.strerror or e}") from None
    if expanded.suffix == ".model":
        return _from_sentence_piece(file, path)
    return from_json(file, path)


def from_json(file: bytes, path: str = "tokenizer.json") -> Tokenizer:
    """Reads a tokenizer.json that is byte-level, or has SentencePiece's spaces and byte tokens.

    Args:
        file: its bytes.
        path: for messages.

    Raises:
        UserError: for an invalid file, or a tokenizer that can't be used.
    """
    try:
        description = json.loads(file)
        if description["model"].pop("dropout", None):  # of merges, at random: encoding must give the same every time
            tokenizer = HuggingFaceTokenizer.from_buffer(json.dumps(description).encode())
        else:
            tokenizer = HuggingFaceTokenizer.from_buffer(file)
    except Exception as e:  # the library raises Exception itself
        raise UserError(f"data.tokenizer {path!r} is not a tokenizer.json or a SentencePiece .model ({e})") from None
    names = tokenizer.get_vocab(with_added_tokens=True)
    if (largest := max(names.values(), default=-1)) not in range(MOST_IDS):
        raise UserError(f"data.tokenizer {path!r} has ids up to {largest}; from 0 to below {MOST_IDS:,} can be used")
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    ends = [name for name in special if END_NAME.fullmatch(re.sub(f"[_{SPACE}]", " ", name))]
    end = next((name for name in END_NAMES if name in names), ends[0] if len(ends) == 1 else None)
    if end is None:
        raise UserError(
            f"data.tokenizer {path!r} has no end-of-text token: none of {', '.join(END_NAMES)}, and "
            f"{len(ends)} special tokens that call themselves an end"
        )
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True  # as text
    tokenizer.no_truncation()
    tokenizer.no_padding()

    added = tokenizer.get_added_tokens_decoder()
    byte_level = '"ByteLevel"' in json.dumps(description.get("decoder"))
    if not byte_level and not any(name.startswith(SPACE) for name in names):
        raise UserError(
            f"data.tokenizer {path!r} is neither byte-level nor of SentencePiece's kind, the two that can be used"
        )
    byte_of = {char: byte for byte, char in _map_byte_characters().items()}
    pieces = [b""] * (max(names.values()) + 1)
    for name, i in names.items():
        if i in added:
            pieces[i] = b"" if added[i].special else name.encode()
        elif byte_level and not byte_of.keys() >= set(name):
            raise UserError(f"data.tokenizer {path!r} is byte-level, and its token {name!r} does not stand for bytes")
        elif byte_level:
            pieces[i] = bytes(byte_of[char] for char in name)
        else:
            pieces[i] = _piece_bytes(name)

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(encode_batch, pieces, names[end], file, _adds_leading_space(encode_batch, pieces))


def _from_sentence_piece(file: bytes, path: str) -> Tokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(f"data.tokenizer {path!r} is a SentencePiece model; pip install sentencepiece") from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=file)
    except RuntimeError as e:
        raise UserError(f"data.tokenizer {path!r} is not a SentencePiece model ({e})") from None
    if model.eos_id() < 0:
        raise UserError(f"data.tokenizer {path!r} has no end-of-text token; train it with --eos_id")
    pieces = [
        b"" if model.is_control(i) or model.is_unknown(i) else _piece_bytes(model.id_to_piece(i))
        for i in range(model.get_piece_size())
    ]
    return Tokenizer(model.encode, pieces, model.eos_id(), file, _adds_leading_space(model.encode, pieces))


def _piece_bytes(name: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name):
        return bytes.fromhex(byte[1])
    return name.replace(SPACE, " ").encode()


def _adds_leading_space(encode_batch: Callable[[list[str]], list[list[int]]], pieces: list[bytes]) -> bool:
    return b"".join(pieces[i] for i in encode_batch(["a"])[0]).startswith(b" ")


def _map_byte_characters() -> dict[int, str]:
    """Maps each byte to the printable character that stands for it in byte-level BPE (Radford et al. 2019, encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
