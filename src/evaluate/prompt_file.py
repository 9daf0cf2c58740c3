"""A file of prompts, with or without answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.prompts import PromptWriter
from src.data.row_formats import DroppedRowError, Prompt, prompt_of
from src.data.sources import Row, read_file
from src.data.tables import expanded, read_bytes
from src.errors import DataError
from src.types import PreferencePair, PromptRow


@dataclass(frozen=True)
class PromptFile:
    """Prompts as a corpus that holds nothing else; every split is all of them."""

    rows: list[PromptRow]
    places: list[str]  # of each row: file and line

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


def read_prompts(path: str, own: str = "prompt", writer: PromptWriter | None = None) -> PromptFile:
    """Prompts of a `.jsonl` file (column `prompt`, the other columns are metadata) or of a text, one per line.

    `own`: the column that is read where the file's first row has no column `prompt`. `writer` writes them as a run's
    data set does: by its template, as chats, or as they are. Raises `DataError` that names file, line and column.
    """
    lines = _lines(path) if Path(path).suffix != ".jsonl" else None
    if lines is None:
        rows = read_file(expanded(path, "prompts"))
    else:
        rows = [Row(f"{path}:{number}", {"prompt": line}) for number, line in enumerate(lines, start=1)]
    first, writer = rows[0].columns, writer or PromptWriter(None, False, None, None, None)
    column = own if own in first and "prompt" not in first else "prompt"
    return PromptFile([_prompt(row, column, writer) for row in rows], [row.where for row in rows])


def _prompt(row: Row, column: str, writer: PromptWriter) -> PromptRow:
    metadata = {name: value for name, value in row.columns.items() if name != "prompt"}
    given = None if writer.template is not None else _given(row, column)
    try:
        text, messages = writer.write(given, row)
    except DroppedRowError as dropped:
        raise DataError(f"{row.where}: {dropped}") from None
    return PromptRow(text, metadata if messages is None else {**metadata, "prompt_messages": messages})


def _given(row: Row, column: str) -> Prompt:
    if column not in row.columns:
        rename = "; rename the one with the prompts to prompt" if column == "prompt" else ""
        raise DataError(f"{row.where} has no column {column!r}, only {sorted(row.columns)}{rename}")
    value = row.columns[column]
    if not isinstance(value, str | list) or not value:
        raise DataError(f"{row.where}: column {column!r} must be a text that is not empty, not {value!r}")
    return prompt_of(row, column)


def given_responses(prompts: PromptFile) -> list[list[str]] | None:
    """The column `responses` of each row, a text or a list of texts; None when no row has it.

    Raises `DataError` when only some rows have it, or when it holds anything else.
    """
    found: list[Any] = [row.metadata.get("responses") for row in prompts.rows]
    if all(cell is None for cell in found):
        return None
    for place, cell in zip(prompts.places, found, strict=True):
        texts = cell if isinstance(cell, list) else [cell]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: column 'responses' must be a text or a list of texts, not {cell!r}")
    return [cell if isinstance(cell, list) else [cell] for cell in found]


def _lines(path: str) -> list[Any]:
    file = expanded(path, "prompts")
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
