"""Answers of a service, kept by what was asked; in a file, if one is given, also for other runs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from src.errors import ConfigError, RewardError


class AnswerCache:
    """Texts by question. A file has one {"question": SHA-256, "answer": text} per line and only grows.

    A last line without its end, as a killed run leaves it, is cut off. Raises
    `ConfigError` for a file that cannot be read or written, or has any other line.
    """

    def __init__(self, path: str | None) -> None:
        self.path, self.answers = None if path is None else Path(path), dict[str, str]()
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._read(self.path)
            except OSError as error:
                raise ConfigError(f"cache={path}: {error.strerror}") from error

    def get(self, question: Any) -> str | None:
        """The answer to a question, if there is one."""
        return self.answers.get(key_of(question))

    def add(self, question: Any, answer: str) -> None:
        """Keep an answer. Raises `RewardError` when the file cannot be written."""
        key = key_of(question)
        self.answers[key] = answer
        if self.path is None:
            return
        line = json.dumps({"question": key, "answer": answer}).encode() + b"\n"
        try:
            with self.path.open("ab") as file:  # one write at the end of the file, whoever else adds to it
                file.write(line)
        except OSError as error:
            raise RewardError(f"cache={self.path}: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                os.truncate(path, sum(map(len, lines[:-1])))
                lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self.answers[row["question"]] = str(row["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"cache={path}, line {number}: not an answer that was kept: {line[:60]!r}") from error


def key_of(question: Any) -> str:
    """The SHA-256 of a question."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
