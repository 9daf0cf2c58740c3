"""The rows of a corpus, which may be a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src.errors import DataError
from src.types import Corpus, PreferencePair, PromptRow

ROWS: dict[str, tuple[type, str]] = {  # method of a corpus -> what it lists, and who reads that
    "texts": (str, "SFT and PPO-ptx"),
    "prompts": (PromptRow, "PPO"),
    "pairs": (PreferencePair, "the reward model"),
}


def rows_of(corpus: Corpus, name: str, split: str) -> Sequence[Any]:
    """The rows `corpus.NAME(split)`. Raises `DataError` when there are none, or they are of another type."""
    kind, use = ROWS[name]
    method = getattr(corpus, name, None)
    if method is None:
        raise DataError(f"the corpus ({type(corpus).__name__}) has no method {name}(split): {use} needs one")
    rows, where = method(split), f"{type(corpus).__name__}.{name}({split!r})"
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise DataError(f"{where} is {rows!r:.60}: {use} needs a list of {kind.__name__}")
    if not rows:
        raise DataError(f"{where} is empty: {use} needs at least one row")
    for number, row in enumerate(rows):
        if not isinstance(row, kind):
            give = f"PromptRow({row!r:.60})" if (name, type(row)) == ("prompts", str) else kind.__name__
            raise DataError(f"{where}[{number}] is of type {type(row).__name__}: give {give}")
    return rows
