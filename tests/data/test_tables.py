"""Reading jsonl files: every error is one sentence with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from src.data.tables import check_split, cut_prompt, read_jsonl
from src.errors import DataError


def write(folder: Path, content: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n \n"])
def test_rows_come_back_in_order_with_all_columns(tmp_path: Path, ending: bytes) -> None:
    rows = [{"text": "naïve", "extra": [1, None]}, {"text": "line\u2028separator"}]
    content = b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    path = write(tmp_path, content + ending)
    assert read_jsonl(path, ["text"]) == read_jsonl(str(path), []) == dict(enumerate(rows, start=1))


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert read_jsonl(path, ["a"]) == {1: {"a": 1}, 2: {"a": 2}}


def test_blank_lines_are_no_rows_and_the_others_keep_their_number(tmp_path: Path) -> None:
    path = write(tmp_path, b'\n{"a": 1}\n \r\n\n{"a": 2}\n')
    assert read_jsonl(path, ["a"]) == {2: {"a": 1}, 5: {"a": 2}}
    path.write_bytes(b'{"a": 1}\n\n{"b": 2}\n')
    with pytest.raises(DataError, match=r":3 has no column 'a'"):
        read_jsonl(path, ["a"])


GOOD = b'{"text": "x", "rating": 1}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path} is empty, but must have one JSON object per line with the columns text and rating"),
        (b" \n\n", "{path} is empty, but must have one JSON object per line with the columns text and rating"),
        (GOOD + b'{"text": "x"\n', "{path}:2 is not valid JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (GOOD * 2 + b'{"text": "\xff"}', "{path}:3 is not valid UTF-8: byte 11 of the line is 0xff"),
        (b"[1]\n", "{path}:1 must be a JSON object with the columns text and rating, but is a list"),
        (GOOD + b'{"text": "x", "Rating": 1}', "{path}:2 has no column 'rating', only ['Rating', 'text']"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=f"^{re.escape(message.format(path=path))}$"):
        read_jsonl(path, ["text", "rating"])


def test_a_number_with_too_many_digits_is_invalid_json(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": ' + b"9" * 5_000 + b"}")
    with pytest.raises(DataError, match=":1 is not valid JSON"):
        read_jsonl(path, ["text"])


def test_a_missing_file_is_named_with_its_absolute_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = f"there is no file {tmp_path / 'some.jsonl'} (it must have the column text)"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read_jsonl("some.jsonl", ["text"])
    with pytest.raises(DataError, match="there is no file"):
        read_jsonl(tmp_path, ["text"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [(1, ("a", " b c")), (2, ("a b", " c")), (3, ("a b c", "")), (4, ("a b c", ""))],
)
def test_cut_prompt_keeps_every_character(words: int, parts: tuple[str, str]) -> None:
    assert cut_prompt("a b c", words) == parts


def test_unknown_split_is_refused() -> None:
    check_split("validation")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, but is 'val'"):
        check_split("val")
