"""Rows of a data set, from a file, a folder or the hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.tables import SPLITS, expanded, read_bytes, read_json, read_jsonl
from src.errors import DataError
from src.utils.hub import for_hub

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
STORED = ("state.json", "dataset_dict.json")  # of a set, and of several splits, in a folder of `save_to_disk`
CELL = 2**31 - 1  # characters, the most that one cell of a table may have


@dataclass(frozen=True)
class Row:
    """One row and its place: `file.jsonl:12`, or `openai/gsm8k, split train, row 12`."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a set is, and its names of the splits.

    `path` is a file (.jsonl, .json, .csv, .parquet), a folder, or a name on the hub. A file is the train split, and
    `splits` may name files for the others. A folder has one file per split, such as `FOLDER/NAME.jsonl`, or is one of
    `save_to_disk`; in any other folder, and on the hub, the library `datasets` finds the files. It reads Parquet and
    the hub; text files of a folder are read as single files are, as it would make dates and numbers of their texts.
    """

    path: str
    name: str | None  # the configuration, for a set with several
    revision: str | None  # branch or commit on the hub
    folder: str | None  # a folder within the set, to read only that
    splits: dict[str, str | None]  # train, validation, test -> the set's own name, None where it has none

    def read(self) -> dict[str, list[Row]]:
        """The rows of every split of the set. Raises `DataError`."""
        if set(self.splits) != set(SPLITS):
            raise DataError(f"data.splits must name {', '.join(SPLITS)} (null where there is none): {self.splits}")
        if Path(self.path).suffix in FORMATS:
            files = {"train": self.path}
            files |= {k: v for k, v in self.splits.items() if k != "train" and v and Path(v).suffix in FORMATS}
            return {
                split: read_file(expanded(file, "data.path" if split == "train" else f"data.splits.{split}"))
                for split, file in files.items()
            }
        if self.splits["train"] is None:
            raise DataError("data.splits.train=null: give the set's name of the training split")
        return {split: self._split(own) for split, own in self.splits.items() if own is not None}

    def _split(self, own: str) -> list[Row]:
        folder = expanded(self.path, "data.path")
        if folder.is_file():
            raise DataError(f"cannot read {folder}: the name of a data file ends with {', '.join(FORMATS)}")
        for suffix in FORMATS if folder.is_dir() else ():
            if (folder / f"{own}{suffix}").is_file():
                return read_file(folder / f"{own}{suffix}")
        if any((folder / name).is_file() for name in STORED):
            return _stored(folder, own)
        if not folder.is_dir() and (
            folder.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1
        ):
            raise DataError(f"there is no file or folder {folder}: give one with data.path, or a name on the hub")
        options = {"name": self.name, "revision": self.revision, "data_dir": self.folder, "split": own}
        where = f"{self.path}, split {own}"
        if not folder.is_dir():
            return _borrowed(self.path, options, where)
        files = _text_files(str(folder), options, where)
        return [row for file in files for row in read_file(file)] or _borrowed(str(folder), options, where)


def read_file(file: Path) -> list[Row]:
    """The rows of one file. Raises `DataError` with file and, if the format has lines, line."""
    if not file.is_file():
        raise DataError(f"there is no file {file.absolute()}")
    if file.suffix == ".jsonl":
        return _numbered(read_jsonl(file, []), file)
    if file.suffix == ".json":
        return _read_json(file)
    if file.suffix == ".csv":
        return _read_csv(file)
    return _borrowed(file.suffix.removeprefix("."), {"data_files": str(file), "split": "train"}, str(file))


def _read_json(file: Path) -> list[Row]:
    """A list of objects, or one object per line, as many sets name their JSON lines `.json`."""
    content = read_bytes(file)
    if not content.lstrip().startswith(b"["):
        try:
            return _numbered(read_jsonl(file, []), file)
        except DataError:
            if not _is_one_value(content):
                raise
        raise DataError(f"{file} is one JSON value: it must be a list of objects, or have one object on each line")
    try:
        rows = read_json(content, str(file))
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(_no_utf8(file, content, error)) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno} is not valid JSON: {error.msg}") from None
    except ValueError as error:  # a number with too many digits
        raise DataError(f"{file} is not valid JSON: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {number} must be a JSON object, but is a {type(row).__name__}")
    return [Row(f"{file}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _is_one_value(content: bytes) -> bool:
    """Whether it is one JSON value over several lines."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return len(content.strip().splitlines()) > 1


def _read_csv(file: Path) -> list[Row]:
    """The rows of a table, every cell as the text that it is; a row's number is that of its first line.

    Raises `DataError` for another encoding than UTF-8, another separator than the comma, a column name that is there
    twice, a row with more or fewer cells than the first line has names, or a table without rows.
    """
    content = read_bytes(file)
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{_no_utf8(file, content, error)}; save it as UTF-8") from None
    csv.field_size_limit(CELL)
    table, number = {}, 1
    try:
        for cells in lines:
            if cells:
                table[number] = cells
            number = lines.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{number} cannot be read as a row of a table: {error}") from None
    _check_table(table, file)
    names, *rows = table.values()
    return _numbered(
        {n: dict(zip(names, cells, strict=True)) for n, cells in zip([*table][1:], rows, strict=True)}, file
    )


def _check_table(table: dict[int, list[str]], file: Path) -> None:
    """Raise `DataError` unless a line of column names is followed by rows with as many cells."""
    if len(table) < 2:
        raise DataError(f"{file} has no rows: it needs a line with the column names and one line per row")
    names = next(iter(table.values()))
    other = next((sign for sign in ";\t" if len(names) == 1 and sign in names[0]), None)
    if other is not None:
        raise DataError(f"{file}:1 separates the columns by {other!r}: they must be separated by commas")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}:1 names the column {twice!r} twice")
    for number, cells in table.items():
        if len(cells) != len(names):
            raise DataError(f"{file}:{number} has {len(cells)} cells where the first line has {len(names)}")


def _no_utf8(file: Path, content: bytes, error: UnicodeDecodeError) -> str:
    line = content.count(b"\n", 0, error.start) + 1
    return f"{file}:{line} is not valid UTF-8: there is a byte {content[error.start]:#04x}"


def _numbered(rows: dict[int, dict[str, Any]], file: Path) -> list[Row]:
    return [Row(f"{file}:{number}", row) for number, row in rows.items()]


def _text_files(folder: str, options: dict[str, Any], where: str) -> list[Path]:
    """The files of a split in a folder, where `datasets` looks for them, if all are text; otherwise none."""
    import datasets

    own = options["split"]
    with _in_words(folder, options, where):
        builder = datasets.load_dataset_builder(folder, **{k: v for k, v in options.items() if k != "split"})
        found = [Path(str(file)) for file in (builder.config.data_files or {}).get(own, [])]
    return found if all(file.suffix in FORMATS and file.suffix != ".parquet" for file in found) else []


def _stored(folder: Path, own: str) -> list[Row]:
    """The rows of a folder that `save_to_disk` of the library `datasets` wrote: the split `own`, or all that it has."""
    import datasets

    where = f"{folder}, split {own}"
    with _in_words(str(folder), {"data_files": None}, where):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if own not in loaded:
            raise DataError(f"cannot read {where}: it has the splits {sorted(loaded)} (data.splits)")
        loaded = loaded[own]
    return [Row(f"{where}, row {number}", row) for number, row in enumerate(loaded, start=1)]


def _borrowed(path: str, options: dict[str, Any], where: str) -> list[Row]:
    """Rows that the library `datasets` reads."""
    import datasets  # takes a second to import, so only when it is needed
    from pyarrow.parquet import read_metadata

    with _in_words(path, options, where):
        if path == "parquet" and not read_metadata(options["data_files"]).num_rows:
            raise ValueError("it has no rows")  # of which `datasets` says that a batch size is 0
        loaded = datasets.load_dataset(for_hub(path), **options)
        return [Row(f"{where}, row {number}", row) for number, row in enumerate(loaded, start=1)]


@contextmanager
def _in_words(path: str, options: dict[str, Any], where: str) -> Iterator[None]:
    """Without the progress bars of `datasets`, and with one sentence for its errors."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_why(path, options, where, error)) from error


def _why(path: str, options: dict[str, Any], where: str, error: Exception) -> str:
    """What could not be read, why, and what to do."""
    reason = " ".join(str(error.__cause__ or error).split())
    reason = re.split(r" Example of usage| This happened while", reason)[0]
    if "data_files" in options or Path(path).is_dir():
        return f"cannot read {where}: {reason}"
    if not isinstance(error, OSError):  # the set exists and has no such configuration or split
        return f"cannot read {where} (data.name={options['name']}): {reason}"
    return (
        f"no usable data set at {path!r} (data.path): it is no local file or folder, not in the cache of `datasets`, "
        f"and the hub cannot be reached or does not have it ({reason}); give a local copy with data.path=FILE or "
        f"data.path=FOLDER, made where there is a network: `hf download --repo-type dataset {path} --local-dir FOLDER`"
    )
