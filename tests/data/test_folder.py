import gzip
import json
import os

import pytest

from sparse_lm.data.folder import PIECE_BYTES, RECORD_CHARACTERS, Folder
from sparse_lm.errors import UserError


def read(folder, **options):
    return [tuple(d) for d in Folder(str(folder), **options).documents()]


def test_all_kinds_of_files_plain_and_gzipped(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n".encode())
    (tmp_path / "b.md.gz").write_bytes(gzip.compress("# zwei ü".encode()))
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "n": 1}')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}\n'))
    (tmp_path / "e.pdf").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    assert [text for text, _, _ in read(tmp_path)] == ["one\r\n", "# zwei ü", "three", "four", "five"]


def test_first_folders_are_domains_and_one_is_held_out(tmp_path):
    for path in ("top.txt", "de/a.txt", "de/deep/b.txt", "heldout/c.txt", "law/d.txt", ".git/e.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    assert read(tmp_path) == [
        ("de/a.txt", "", "de"),
        ("de/deep/b.txt", "", "de"),
        ("heldout/c.txt", "heldout_domain", ""),
        ("law/d.txt", "", "law"),
        ("top.txt", "", ""),
    ]
    assert ("law/d.txt", "heldout_domain", "") in read(tmp_path, heldout="law")
    with pytest.raises(UserError, match="no sub-folder 'lww' to hold out; did you mean 'law'"):
        read(tmp_path, heldout="lww")


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}')
    assert read(tmp_path, field="body") == [("x", "", "")]


def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    paragraphs = [f"{i} ü " * (i % 50 + 1) + "\n" + "\n" * (i % 9 == 0) for i in range(1500)]
    text = "".join(paragraphs) + "x" * 100_000 + "日" * 50_000
    (tmp_path / "book.txt").write_text(text)
    pieces = [piece for piece, _, _ in read(tmp_path)]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 3 * PIECE_BYTES
    assert sum(piece.endswith("\n\n") for piece in pieces) > 10


def test_a_short_text_is_one_document(tmp_path):
    text = "line\n\n" * (PIECE_BYTES // 7)
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path) == [(text, "", "")]


def test_half_a_surrogate_pair_in_json_becomes_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud83d b \ud83d\ude42"}')
    assert read(tmp_path)[0][0] == "a\ufffd b 🙂"


def test_the_key_follows_content_names_and_options_but_not_the_place(tmp_path):
    def key(name, **files):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / f"{file}.txt").write_text(content)
        os.utime(folder / f"{file}.txt", (1, 1))
        return Folder(str(folder)).fingerprint()

    one = key("a", x="1", y="2")
    assert key("b", x="1", y="2") == one
    other_field = Folder(str(tmp_path / "a"), field="f").fingerprint()
    assert len({one, key("c", x="1", y="3"), key("d", x="1", z="2"), other_field}) == 4


def jsonl(*lines):
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()


GOOD = {"text": "fine"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"good \n" * 4000 + b"bad \xff here", "a.txt: not UTF-8 at byte 24004 "),
        ("a.txt", "ü".encode()[:1], "a.txt: not UTF-8 at byte 0 "),
        ("a.txt", b"x" * (PIECE_BYTES - 1) + b"\xc3", f"a.txt: not UTF-8 at byte {PIECE_BYTES - 1} "),
        ("a.txt", b"x" * (PIECE_BYTES - 1) + b"\xc3x", f"a.txt: not UTF-8 at byte {PIECE_BYTES - 1} "),
        ("a.md.gz", gzip.compress(b"ab\xff", mtime=0), "a.md.gz: not UTF-8 at byte 2 "),
        ("a.md.gz", gzip.compress(os.urandom(4000))[:2000], "a.md.gz"),
        ("a.txt.gz", gzip.compress(b"fine" * 100, mtime=0)[:-9], "a.txt.gz is not a whole gzip file"),
        ("a.txt.gz", b"plain", "a.txt.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(jsonl(GOOD, "{"), mtime=0), "a.jsonl.gz, line 2: not JSON"),
        ("a.jsonl", jsonl(GOOD, GOOD, '{"text": '), r"a.jsonl, line 3: not JSON \(.* at column"),
        ("a.jsonl", jsonl(GOOD, "", [1]), "a.jsonl, line 3: a JSON object was expected, this is a list"),
        ("a.jsonl", jsonl(GOOD, {"txt": "x"}), "a.jsonl, line 2: no field 'text'; did you mean 'txt'"),
        ("a.jsonl", jsonl({"text": 3}), "a.jsonl, line 1: field 'text' is a int"),
        ("a.jsonl", jsonl(GOOD) + b'\n{"text": "\xff"}', "a.jsonl, line 2: not UTF-8 at byte 10 of the line"),
    ],
)
def test_bad_content_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        Folder(str(tmp_path / "nowhere")).fingerprint()
    with pytest.raises(UserError, match="no .txt, .md, .jsonl files in it"):
        Folder(str(tmp_path)).fingerprint()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="a.txt is a file, not a folder"):
        Folder(str(tmp_path / "a.txt")).fingerprint()


def test_links_pipes_and_files_of_other_kinds_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "sub/b.txt").write_text("two")
    for name in ("latest", "current", "sub/up"):  # 2^40 paths, were they followed
        (folder / name).symlink_to(folder)
    (tmp_path / "out.txt").write_text("not in the folder")
    (folder / "out.txt").symlink_to(tmp_path / "out.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.txt")
    for name in ("B.TXT", "c.json", "d.json", "LICENSE"):
        (folder / name).write_text("three")
    made = Folder(str(folder))
    assert [d.text for d in made.documents()] == ["one", "two"]
    assert made.left_out == (
        "1 files named *.TXT, 2 files named *.json, 1 files named *LICENSE, 1 pipes or devices, 5 symbolic links"
    )
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert len(list(Folder(str(tmp_path / "link")).documents())) == 2


def test_text_in_utf_16_without_a_mark_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("some text".encode("utf-16-le"))
    with pytest.raises(UserError, match="a.txt: byte 1 is 0, which no text has; if it is UTF-16, convert it"):
        read(tmp_path)


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5_000, '{"a":' * 100_000])
def test_json_that_python_can_not_hold_is_named(tmp_path, value):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "x", "n": ' + value)
    with pytest.raises(UserError, match="a.jsonl, line 2: "):
        read(tmp_path)


def test_a_long_record_is_cut_and_nothing_is_lost(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(2 * RECORD_CHARACTERS + 5))
    (tmp_path / "a.jsonl").write_text(jsonl({"text": text}, {"text": "short"}).decode())
    texts = [d.text for d in Folder(str(tmp_path)).documents()]
    assert [len(t) for t in texts] == [RECORD_CHARACTERS, RECORD_CHARACTERS, 5, 5] and "".join(texts[:3]) == text
