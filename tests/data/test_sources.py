"""Rows from files of every format and from folders; every error is one sentence with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from src.data.sources import Source, read_file
from src.errors import DataError
from tests.data.sets import write_rows

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
NAMES = {"train": "train", "validation": None, "test": None}
ROWS = [{"q": f"naïve {i}", "n": i, "m": [{"role": "user", "content": "x"}]} for i in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps what it read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def source(path: Path | str, splits: dict[str, str | None] = NAMES, **options: Any) -> Source:
    return Source(str(path), **({"name": None, "revision": None, "folder": None} | options), splits=splits)


def write(folder: Path, name: str) -> Path:
    """The rows in the format that the name ends in."""
    import datasets

    file = folder / name
    if name.endswith(".jsonl"):
        return write_rows(file, ROWS)
    if name.endswith(".json"):
        file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    else:
        file.write_text("q,n\n" + "".join(f"{row['q']},{row['n']}\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    wanted = [{"q": row["q"], "n": str(row["n"])} if name == "a.csv" else row for row in ROWS]
    found = source(file).read()
    assert list(found) == ["train"]
    assert [row.columns for row in found["train"]] == wanted
    place = {"a.jsonl": ":2", "a.csv": ":3"}.get(name, ", row 2")
    assert found["train"][1].where == f"{file}{place}"


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.json", ROWS)
    assert [row.columns for row in read_file(file)] == ROWS


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path, "learn.jsonl")
    write(tmp_path, "dev.parquet")
    found = source(tmp_path, {"train": "learn", "validation": "dev", "test": None}).read()
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "validation": 3}


def test_a_folder_as_the_hub_has_it(tmp_path: Path) -> None:
    """Configurations and splits in the front matter, shards in folders; and the folder of a converted set."""
    (tmp_path / "main").mkdir()
    write(tmp_path, "main/train_prefs-00000-of-00001.parquet")
    write(tmp_path, "main/other-00000-of-00001.parquet")
    configs = "- config_name: {}\n  data_files:\n  - split: train_prefs\n    path: main/train_prefs-*\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs.format('main')}{configs.format('second')}---\n")
    splits = {"train": "train_prefs", "validation": None, "test": None}
    (row, *_), where = source(tmp_path, splits, name="main").read()["train"], f"{tmp_path}, split train_prefs, row 1"
    assert (row.columns, row.where) == (ROWS[0], where)
    for name, words in ((None, r"Config name is missing.*\['main', 'second'\]"), ("mein", "'mein' not found")):
        with pytest.raises(DataError, match=words) as refused:
            source(tmp_path, splits, name=name).read()
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match=r"Unknown split \"train\"\. Should be one of \['train_prefs'\]"):
        source(tmp_path, NAMES, name="main").read()


def test_a_folder_within_the_set(tmp_path: Path) -> None:
    for name in ("comparisons/train", "comparisons/validation", "axis/train"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path, f"{name}/0000.parquet")
    splits = {"train": "train", "validation": "validation", "test": None}
    found = source(tmp_path, splits, folder="comparisons").read()
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "validation": 3}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": \n', "{path}:2 is not valid JSON: Expecting value"),
        ("a.jsonl", b'{"q": 1}\n{"q": "\xff"}\n', "{path}:2 is not valid UTF-8: byte 8 of the line is 0xff"),
        ("a.json", b'[{"q": 1},\n {"q": 2,}]', "{path}:2 is not valid JSON"),
        ("a.json", b'[{"q": 1},\n\n {"q": "\xff"}]', "{path}:3 is not valid UTF-8: there is a byte 0xff"),
        ("a.json", b"[{}, 2]", "{path}, row 2 must be a JSON object, but is a int"),
        ("a.csv", b"q,a\n1,2\n1,2,3,4\n", "{path}:3 has 4 cells where the first line has 2"),
        ("a.csv", b"q,a\n1,2\n1\n", "{path}:3 has 1 cells where the first line has 2"),
        ("a.csv", b"q,a,q\n1,2,3\n", "{path}:1 names the column 'q' twice"),
        ("a.csv", b'q,a\n1,2\n"1,2\n3,4\n', "{path}:3 cannot be read as a row of a table: unexpected end of data"),
        ("a.csv", "q,a\n1,好\n".encode("gbk"), "{path}:2 is not valid UTF-8: there is a byte 0xba; save it as UTF-8"),
        ("a.csv", b"", "{path} has no rows: it needs a line with the column names and one line per row"),
        ("a.csv", b"q,a\n", "{path} has no rows: "),
        ("a.csv", b"q;a\n1,5;2\n", "{path}:1 separates the columns by ';': they must be separated by commas"),
        ("a.csv", b"q\ta\n1\t2\n", "{path}:1 separates the columns by '\\t': they must be separated by commas"),
        ("a.json", b'{\n"data": [{"q": 1}]\n}', "{path} is one JSON value: it must be a list of objects, or have one"),
        ("a.jsonl", b'{"q": 1}\n{"q": "a", "q": "b"}\n', "{path}:2 names 'q' twice in one object"),
        ("a.jsonl", b'{"m": [{"role": "user", "role": "x"}]}\n', "{path}:1 names 'role' twice in one object"),
        ("a.jsonl", LFS, "{path} is a pointer of git-lfs, not the file itself: run `git lfs pull`"),
        ("a.csv", LFS, "{path} is a pointer of git-lfs, not the file itself: run `git lfs pull`"),
        ("a.parquet", b"nonsense", "cannot read {path}: Parquet magic bytes not found in footer"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        source(tmp_path / name).read()
    assert str(refused.value).startswith(words.format(path=tmp_path / name))
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=rf"there is no file {re.escape(str(tmp_path))}/absent\.jsonl$"):
        source(tmp_path / "absent.jsonl").read()
    with pytest.raises(DataError, match=r"no file or folder .*absent: give one with data\.path, or a name on the hub"):
        source(tmp_path / "absent").read()


def test_a_set_that_the_hub_does_not_give_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as refused:
        source("openai/gsm8k", name="main").read()
    message = str(refused.value)
    assert message.startswith("no usable data set at 'openai/gsm8k' (data.path): it is no local file or folder")
    assert "`hf download --repo-type dataset openai/gsm8k --local-dir FOLDER`" in message
    assert "\n" not in message


def test_splits_have_three_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.splits must name train, validation, test"):
        source(tmp_path, {"train": "train", "valid": "x"}).read()
    with pytest.raises(DataError, match=r"data\.splits\.train=null"):
        source(tmp_path, {"train": None, "validation": None, "test": "x"}).read()


def test_a_cell_of_a_table_is_the_text_that_it_is(tmp_path: Path) -> None:
    """No cell is a number, and none stands for a missing value; a quoted one may go over lines."""
    cells = ["007", "2.50", "1e3", "None", "NA", "nan", "null", "", " a ", 'say ""it""\ntwice', "true", "2026-11-26"]
    lines = [f'"{cell}",{number}' for number, cell in enumerate(cells)]
    file = tmp_path / "a.csv"
    file.write_bytes(("\ufeffq,n\r\n" + "\r\n\r\n".join(lines) + "\r\n").encode())
    found = read_file(file)
    wanted = [cell.replace('""', '"') for cell in cells]
    assert [row.columns for row in found] == [{"q": cell, "n": str(n)} for n, cell in enumerate(wanted)]
    places = [int(row.where.rpartition(":")[2]) for row in found]
    assert places == [2 + 2 * n + (n > 9) for n in range(12)]  # the tenth cell, counted from 0, has one line more


def test_a_blank_line_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"q": 1}\n\n{"q": 2}\n')
    assert [(row.where, row.columns) for row in read_file(file)] == [(f"{file}:1", {"q": 1}), (f"{file}:3", {"q": 2})]


@pytest.mark.parametrize("suffix", ["", ".jsonl"])
def test_a_path_that_no_system_can_look_for_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    for path in ("x" * 300 + suffix, f"~nosuchuser/set{suffix}"):
        with pytest.raises(DataError, match=r"^data\.path=.{9,100}: there can be no such file: ") as refused:
            source(path).read()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_text_files_of_a_folder_are_read_as_single_files_are(tmp_path: Path, suffix: str) -> None:
    """The library that finds a split's shards would make dates, fractions and missing values of these."""
    cells = ["007", "2026-11-27", "None", "2.50"]
    whole: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        file = tmp_path / f"train-{number}-of-{len(cells)}{suffix}"
        row: dict[str, Any] = {"q": cell, "n": number} if suffix == ".jsonl" else {"q": cell, "n": str(number)}
        file.write_text(json.dumps(row) + "\n" if suffix == ".jsonl" else f"q,n\n{cell},{number}\n")
        whole.append(row)
    assert [row.columns for row in source(tmp_path).read()["train"]] == whole


@pytest.mark.parametrize("splits", [None, ["train", "held"]])
def test_a_folder_of_save_to_disk(tmp_path: Path, splits: list[str] | None) -> None:
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    stored = saved if splits is None else datasets.DatasetDict({split: saved for split in splits})
    stored.save_to_disk(str(tmp_path / "set"))
    assert [row.columns for row in source(tmp_path / "set").read()["train"]] == ROWS
    if splits is not None:
        with pytest.raises(DataError, match=r"split nope: it has the splits \['held', 'train'\]"):
            source(tmp_path / "set", {**NAMES, "train": "nope"}).read()


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"q": []}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: it has no rows"):
        source(tmp_path / "a.parquet").read()
