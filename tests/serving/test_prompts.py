import json

import pytest

from sparse_lm.errors import UserError
from sparse_lm.serving.prompts import read_prompts


def test_a_folder_gives_its_texts_by_name_without_the_editors_newline(tmp_path):
    for name, text in {"b.txt": "two\n\n", "a.txt": "où ça\n", "c.txt": "", "a.md": "no", ".b.txt.swp": "no"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path, "prompt") == [("a.txt", "où ça"), ("b.txt", "two\n"), ("c.txt", "")]


def test_a_jsonl_file_gives_a_field_of_its_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [{"q": "one\n", "prompt": 1}, {"q": "a\u2028b\u0085c"}]  # ends of a line to Python, not to JSON
    path.write_bytes(b"\n\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows) + b"\r\n")
    assert read_prompts(str(path), "q") == [("some.jsonl:1", "one\n"), ("some.jsonl:3", "a\u2028b\u0085c")]


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        ({}, "none", "there are no prompts: .*none does not exist"),
        ({}, "none.jsonl", "there are no prompts: .*none.jsonl does not exist"),
        ({"a.md": b"x"}, ".", "there are no prompts: .* has no .txt file"),
        ({"a.md": b"x"}, "a.md", "a folder of .txt files or a .jsonl file; .*a.md is neither"),
        ({"a.txt": b"x", "b.txt": b"ab\xff"}, ".", "b.txt is not UTF-8 at byte 2"),
        ({"a.jsonl": b""}, "a.jsonl", "there are no prompts: .*a.jsonl is empty"),
        ({"a.jsonl": b'{"prompt": "x"}\n{"prompt'}, "a.jsonl", "a.jsonl, line 2 is not JSON"),
        ({"a.jsonl": b'{"prompt": "x"}\n\n{"q": "x"}'}, "a.jsonl", "a.jsonl, line 3 has no text in a field 'prompt'"),
        ({"a.jsonl": b'{"prompt": 1}'}, "a.jsonl", "line 1 has no text in a field 'prompt'"),
        ({"a.jsonl": b"[1]"}, "a.jsonl", "line 1 has no text in a field 'prompt'"),
        ({"a.jsonl": b'{"prompt": "\\ud83d"}'}, "a.jsonl", "line 1 has half of a surrogate pair"),
        ({"a.jsonl": b'{"prompt": "\xff"}'}, "a.jsonl", "a.jsonl is not UTF-8 at byte 12"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, files, path, words):
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=words) as told:
        read_prompts(tmp_path / path, "prompt")
    assert "\n" not in str(told.value)


def test_a_folder_with_a_text_that_is_a_folder_is_told(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UserError, match="a.txt can't be read: Is a directory"):
        read_prompts(tmp_path, "prompt")


def test_marks_and_line_ends_of_windows_are_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert read_prompts(tmp_path / "p", "text") == [("a.txt", "one\r\ntwo")]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"text": "one"}\r\n{"text": "two"}\r\n'.encode())
    assert [prompt for _, prompt in read_prompts(tmp_path / "p.jsonl", "text")] == ["one", "two"]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="deep.jsonl, line 1 is not JSON"):
        read_prompts(tmp_path / "deep.jsonl", "text")
