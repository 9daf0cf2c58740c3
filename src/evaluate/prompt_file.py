"""A file of prompts, with or without answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.tables import read_bytes, read_jsonl
from src.errors import DataError
from src.types import PreferencePair, PromptRow


@dataclass(frozen=True)
class PromptFile:
    """Prompts as a corpus that holds nothing else; every split is all of them."""

    rows: list[PromptRow]

    def prompts(self, split: str) -> list[PromptRow]:
        """All prompts."""
        return self.rows

    def texts(self, split: str) -> list[str]:
        """There are none."""
        return []

    def pairs(self, split: str) -> list[PreferencePair]:
        """There are none."""
        return []

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        """No measure."""
        return {}


def read_prompts(path: str, own: str = "prompt") -> PromptFile:
    """Prompts of a `.jsonl` file (column `prompt`, the other columns are metadata) or of a text, one per line.

    `own`: the column that is read where the file's first row has no column `prompt`. Raises `DataError` that names
    file, line and column.
    """
    rows = read_jsonl(path, []) if Path(path).suffix == ".jsonl" else [{"prompt": line} for line in _lines(path)]
    column = own if own in rows[0] and "prompt" not in rows[0] else "prompt"
    for number, row in enumerate(rows, start=1):
        if column not in row:
            rename = "; rename the one with the prompts to prompt" if column == "prompt" else ""
            raise DataError(f"{path}:{number} has no column {column!r}, only {sorted(row)}{rename}")
        if not isinstance(row[column], str) or not row[column]:
            raise DataError(f"{path}:{number}: column {column!r} must be a text that is not empty, not {row[column]!r}")
    return PromptFile([PromptRow(row[column], {k: v for k, v in row.items() if k != "prompt"}) for row in rows])


def given_responses(path: str, prompts: PromptFile) -> list[list[str]] | None:
    """The column `responses` of each row, a text or a list of texts; None when no row has it.

    Raises `DataError` when only some rows have it, or when it holds anything else.
    """
    found: list[Any] = [row.metadata.get("responses") for row in prompts.rows]
    if all(cell is None for cell in found):
        return None
    for number, cell in enumerate(found, start=1):
        texts = cell if isinstance(cell, list) else [cell]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}:{number}: column 'responses' must be a text or a list of texts, not {cell!r}")
    return [cell if isinstance(cell, list) else [cell] for cell in found]


def _lines(path: str) -> list[Any]:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"there is no file {file.absolute()}")
    lines = read_bytes(file).rstrip(b"\r\n").split(b"\n")
    if lines == [b""]:
        raise DataError(f"{file} is empty, but must have one prompt on each line")
    return [_text(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _text(line: bytes, where: str) -> str:
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not valid UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}"
        ) from None
