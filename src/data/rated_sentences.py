"""Sentences with a human rating, from a jsonl file: texts for SFT, and preference pairs without a prompt."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from random import Random
from typing import Any

from src.data.tables import SPLITS, check_split, cut_prompt, read_jsonl, split_by_prompt
from src.errors import DataError, require
from src.types import PreferencePair, PromptRow

# Candidates per partner, of which the least used is chosen; most rounds of pairing.
CANDIDATES = 3
MAX_ROUNDS = 1_000


class RatedSentences:
    """Sentences of a file, split by prompt: 80 % train, up to 10 % validation and up to 10 % test, fixed by the seed.

    White space is normalized to single spaces, so that prompt + rest is the sentence. `dropped` counts what is dropped:
    repeated sentences (the first is kept), sentences of more than `max_words` words, and sentences of at most
    `prompt_words` words, which leave no response.
    """

    def __init__(
        self,
        path: str,
        text_column: str = "text",
        rating_column: str = "rating",
        min_gap: float = 1.0,
        n_pairs: int = 40_000,
        prompt_words: int = 4,
        max_words: int = 40,
        seed: int = 1,
    ) -> None:
        """Read and split the file.

        Args:
            path: A file with one JSON object per line.
            text_column: Column of the sentence.
            rating_column: Column of the rating, a number; higher is better.
            min_gap: Least difference between the ratings of a pair, in units of the rating.
            n_pairs: Most pairs of the train split; the other splits have proportionally fewer.
            prompt_words: Words of a sentence that are its prompt.
            max_words: Longest sentence kept, in words.
            seed: Fixes the splits and the pairs.

        Raises:
            DataError: A row has no usable sentence or rating, or too few rows are left for three splits.
        """
        require(min_gap > 0, "min_gap", min_gap, "above 0")
        require(n_pairs >= 1, "n_pairs", n_pairs, "at least 1")
        require(prompt_words >= 1, "prompt_words", prompt_words, "at least 1")
        require(max_words > prompt_words, "max_words", max_words, f"above prompt_words ({prompt_words})")
        self.path = path
        self.text_column = text_column
        self.rating_column = rating_column
        self.min_gap = min_gap
        self.n_pairs = n_pairs
        self.prompt_words = prompt_words
        self.max_words = max_words
        self.seed = seed
        self.dropped: dict[str, int] = {"repeated": 0, "too long": 0, "too short": 0}
        self._rows = self._split(self._kept(read_jsonl(path, [text_column, rating_column])))
        self._pairs: dict[str, list[PreferencePair]] = {}

    def texts(self, split: str) -> list[str]:
        """Return the sentences of a split."""
        check_split(split)
        return [row[self.text_column] for row in self._rows[split]]

    def prompts(self, split: str) -> list[PromptRow]:
        """Return the first words of each sentence of a split, in the order of `texts`, with the row's other columns."""
        check_split(split)
        return [self._prompt(row) for row in self._rows[split]]

    def pairs(self, split: str) -> list[PreferencePair]:
        """Return pairs of sentences of a split, the higher rated chosen; `gap` is the difference of the ratings."""
        check_split(split)
        if split not in self._pairs:
            self._pairs[split] = self._make_pairs(split)
        return list(self._pairs[split])

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        """Return no measure: natural sentences have no exact one."""
        return {}

    def _kept(self, rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """Check every row and return those that pass the filters, with normalized text."""
        kept: dict[str, dict[str, Any]] = {}
        seen: set[str] = set()
        for line, row in rows.items():
            text = self._checked_text(row, line)
            reason = self._reason(text, seen)
            seen.add(text)
            if reason is None:
                kept[text] = {**row, self.text_column: text}
            else:
                self.dropped[reason] += 1
        return list(kept.values())

    def _checked_text(self, row: dict[str, Any], line: int) -> str:
        """Return the sentence with single spaces, or raise a DataError when the row is unusable."""
        text, rating = row[self.text_column], row[self.rating_column]
        where = f"{self.path}:{line}, column"
        if not isinstance(text, str):
            raise DataError(f"{where} {self.text_column!r} must be a text, but is {text!r}")
        # True is an int in Python, and JSON as Python reads it has NaN and Infinity.
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
            raise DataError(f"{where} {self.rating_column!r} must be a finite number, but is {rating!r}")
        return " ".join(text.split())

    def _reason(self, text: str, seen: set[str]) -> str | None:
        """Return why a sentence is dropped, or None."""
        words = text.count(" ") + 1
        if text in seen:
            return "repeated"
        if words > self.max_words:
            return "too long"
        return "too short" if words <= self.prompt_words else None

    def _split(self, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """The rows of each split; sentences that begin with the same prompt stay together."""
        prompts = [self._prompt(row).prompt for row in rows]
        parts = split_by_prompt(prompts, len(rows) // 10, f"{self.seed}/splits")
        empty = [split for split in SPLITS if not parts[split]]
        if empty:
            reason = f"{self._account(len(rows))}, with {len(set(prompts))} prompts"
            raise DataError(
                f"{self.path} leaves the {' and '.join(empty)} split{'s' * (len(empty) > 1)} empty: {reason}"
            )
        return {split: [rows[row] for row in parts[split]] for split in SPLITS}

    def _account(self, kept: int) -> str:
        """Return how many rows each filter dropped, in words."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"of {kept + sum(self.dropped.values())} rows {kept} are left after dropping {counts}"

    def _prompt(self, row: dict[str, Any]) -> PromptRow:
        prompt, _ = cut_prompt(row[self.text_column], self.prompt_words)
        return PromptRow(prompt, {column: value for column, value in row.items() if column != self.text_column})

    def _make_pairs(self, split: str) -> list[PreferencePair]:
        """Return the pairs of a split, or raise a DataError when there is none."""
        rows = sorted(self._rows[split], key=lambda row: row[self.rating_column])
        ratings = [float(row[self.rating_column]) for row in rows]
        wanted = max(1, self.n_pairs * len(rows) // len(self._rows["train"]))
        matches = _matches(ratings, self.min_gap, wanted, Random(f"{self.seed}/pairs/{split}"))
        if not matches:
            account = self._account(sum(len(part) for part in self._rows.values()))
            raise DataError(f"{self.path} has no two ratings min_gap={self.min_gap} apart in {split!r}: {account}")
        texts = [row[self.text_column] for row in rows]
        return [
            PreferencePair(prompt="", chosen=texts[high], rejected=texts[low], gap=ratings[high] - ratings[low])
            for low, high in matches
        ]


def _matches(ratings: list[float], min_gap: float, wanted: int, rng: Random) -> list[tuple[int, int]]:
    """Return up to `wanted` different (low, high) rows of sorted ratings that are `min_gap` apart, in random order.

    In each round every row gets one partner among the rows far enough below or above it, found by bisection.
    """
    found: dict[tuple[int, int], None] = {}  # a set that keeps the order
    used = [0] * len(ratings)
    for _ in range(MAX_ROUNDS):
        before = len(found)
        for row in rng.sample(range(len(ratings)), len(ratings)):
            pair = _match(row, ratings, min_gap, used, rng)
            if pair is not None and pair not in found and len(found) < wanted:
                found[pair] = None
                used[pair[0]] += 1
                used[pair[1]] += 1
        if len(found) in (before, wanted):
            break
    return list(found)


def _match(row: int, ratings: list[float], min_gap: float, used: list[int], rng: Random) -> tuple[int, int] | None:
    """Return (low, high) of this row and the least used of a few random partners, or None when it has none."""
    below = bisect_right(ratings, ratings[row] - min_gap)
    above = bisect_left(ratings, ratings[row] + min_gap)
    partners = below + len(ratings) - above
    if partners == 0:
        return None
    draws = [rng.randrange(partners) for _ in range(CANDIDATES)]
    candidates = [draw if draw < below else above + draw - below for draw in draws]
    partner = min(candidates, key=used.__getitem__)
    return min(row, partner), max(row, partner)
