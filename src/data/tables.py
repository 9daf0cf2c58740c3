"""Reading tables of text, and the splits and prompts that corpora cut from texts."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random
from typing import Any

from src.errors import DataError
from src.utils.hub import LFS_POINTER, LFS_PULL

SPLITS = ("train", "validation", "test")


def read_jsonl(path: str | Path, columns: list[str]) -> dict[int, dict[str, Any]]:
    """Read a file with one JSON object per line: the rows by the number of their line, without blank lines.

    Args:
        path: The file, UTF-8, with or without a byte order mark.
        columns: Columns that every row must have; others are kept too.

    Raises:
        DataError: The file is missing or empty, or a line is not an object with these columns.
    """
    file = Path(path)
    if not file.is_file():
        wanted = f" (it must have {_listed(columns)})" if columns else ""
        raise DataError(f"there is no file {file.absolute()}{wanted}")
    # Split the bytes, not the text: an invalid byte is then reported with its line.
    lines = {number: line for number, line in enumerate(read_bytes(file).split(b"\n"), start=1) if line.strip()}
    if not lines:
        raise DataError(f"{file} is empty, but must have one JSON object per line{_with(columns)}")
    return {number: _parse(line, f"{file}:{number}", columns) for number, line in lines.items()}


def expanded(path: str, key: str) -> Path:
    """The path with `~` replaced. Raises `DataError` for one that no system can look for, such as a name too long."""
    try:
        file = Path(path).expanduser()
        file.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~USER without such a user; ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{key}={path:.100}: there can be no such file: {reason}") from None
    return file


def read_bytes(file: Path) -> bytes:
    """The content of a file, without a byte order mark. Raises `DataError` when it cannot be read, or is elsewhere."""
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if content.startswith(LFS_POINTER):
        raise DataError(f"{file} is a pointer of git-lfs, not the file itself: {LFS_PULL}")
    return content


def read_json(content: bytes, where: str) -> Any:
    """The value of a JSON text: strings in valid UTF-8, no name twice in an object. Raises `DataError` with `where`."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise DataError(f"{where} names {twice!r} twice in one object: which value counts is not clear")
        return made

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=distinct)
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise DataError(f"{where} is not usable JSON: its lists or objects are nested too deeply") from None
    if b"\\ud" in content.lower():  # such as "\ud83c\udfac", an emoji; half of such a pair is no character
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise DataError(f"{where} holds {half}, one half of a surrogate pair, which is no character") from None
    return value


def check_split(split: str) -> None:
    """Raise a ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}")


def cut_prompt(text: str, words: int) -> tuple[str, str]:
    """Cut a text with single spaces after its first `words` words; the second part keeps its leading space."""
    prompt = " ".join(text.split(" ", words)[:words])
    return prompt, text[len(prompt) :]


def split_by_prompt(
    prompts: Sequence[str], held_out: int, seed: str, first: Collection[str] = ()
) -> dict[str, list[int]]:
    """The rows of each split, in random order: all rows of a prompt are in one split.

    Prompts in random order, those of `first` before the others, go to test while their rows fit into `held_out` rows,
    then to validation, then to train.
    """
    rng = Random(seed)
    rows, left = Counter(prompts), {"test": held_out, "validation": held_out}
    where = {}
    for prompt in sorted(rng.sample(list(rows), len(rows)), key=lambda prompt: prompt not in first):
        fits = [split for split, room in left.items() if rows[prompt] <= room]
        where[prompt] = fits[0] if fits else "train"
        if fits:
            left[fits[0]] -= rows[prompt]
    order = rng.sample(range(len(prompts)), len(prompts))
    return {split: [row for row in order if where[prompts[row]] == split] for split in SPLITS}


def _with(columns: list[str]) -> str:
    return f" with {_listed(columns)}" if columns else ""


def _listed(columns: list[str]) -> str:
    return f"the column{'s' * (len(columns) > 1)} {' and '.join(columns)}"


def _parse(line: bytes, where: str, columns: list[str]) -> dict[str, Any]:
    """Return the row of one line, or raise a `DataError` with `where`."""
    try:
        row = read_json(line, where)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not valid UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}"
        ) from None
    except ValueError as error:  # JSONDecodeError, and a number with too many digits
        raise DataError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object{_with(columns)}, but is a {type(row).__name__}")
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(f"{where} has no column {missing[0]!r}, only {sorted(row)}")
    return row
