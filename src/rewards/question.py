"""A question made from a template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from src.errors import ConfigError, RewardError

PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


class Question:
    """A text with places such as {response}, which are filled in one pass: braces in a response stay as they are.

    `file` has the text, `otherwise` is it without one. A place may name any column of the data. Raises `ConfigError`
    for a file that cannot be read or lacks a place of `needed`.
    """

    def __init__(self, file: str | None, otherwise: str, needed: tuple[str, ...], fixed: dict[str, str]) -> None:
        self.where, self.fixed = file or "built in", fixed
        try:
            self.text = otherwise if file is None else Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"template={file}: cannot be read: {error}") from error
        for name in needed:
            if name not in PLACE.findall(self.text):
                raise ConfigError(f"template={file}: it has no place {{{name}}}, so the judge would not see it")

    def of(self, row: dict[str, Any], **texts: str) -> str:
        """The question about a row of the data. Raises `RewardError` for a place that is no column."""
        known = row | self.fixed | texts

        def filled(place: re.Match[str]) -> str:
            if place[1] not in known:
                names = ", ".join(sorted(known))
                raise RewardError(f"template={self.where}: {place[0]} is no column; there are {names}")
            return str(known[place[1]])

        return PLACE.sub(filled, self.text)
