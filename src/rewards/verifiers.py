"""Verifiable rewards: the response's answer is compared with the reference answer in the prompt's data row."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from math import nan
from typing import Any

from src.errors import RewardError, require

NUMBER = re.compile(
    r"[-+]?[$€£]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"  # as Python and JSON write very large and very small numbers
)


class ExactMatch:
    """1 if the response, stripped of surrounding white space, is the reference answer, else 0."""

    def __init__(self, answer_column: str) -> None:
        self.answer_column = answer_column

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """1 or 0 per response. Raises `RewardError` when a row has no such column."""
        answers = [column(row, self.answer_column) for row in metadata]
        return [float(text.strip() == str(a).strip()) for text, a in zip(responses, answers, strict=True)]


class NumericMatch:
    """1 if the last number of the response is the last number of the reference answer, up to `tolerance`, else 0.

    With a `marker` ("####" in GSM8K) only the text after its last occurrence is read, if it occurs. Numbers may have
    thousands separators, a currency sign and an exponent; they are compared as decimals, without rounding.
    """

    def __init__(self, answer_column: str, marker: str, tolerance: float) -> None:
        require(tolerance >= 0, "tolerance", tolerance, "at least 0")
        self.answer_column, self.marker, self.tolerance = answer_column, marker, Decimal(str(tolerance))

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """1 or 0 per response, NaN without a reference number. Raises `RewardError` without such a column."""
        return [self._score_one(text, row) for text, row in zip(responses, metadata, strict=True)]

    def _score_one(self, response: str, row: dict[str, Any]) -> float:
        wanted = last_number(str(column(row, self.answer_column)), self.marker)
        found = last_number(response, self.marker)
        if wanted is None:  # nothing to compare with: the scorer names the row or drops it
            return nan
        return float(found is not None and abs(found - wanted) <= self.tolerance)


def last_number(text: str, marker: str) -> Decimal | None:
    """The last number after the last marker; None if there is none."""
    found = NUMBER.findall((text.rpartition(marker)[2] if marker else text).replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    try:
        return Decimal(re.sub("[,$€£]", "", found[-1]))
    except InvalidOperation:
        return None


def column(row: dict[str, Any], name: str) -> Any:
    """A column of a data row. Raises `RewardError` with the names of the columns."""
    if name not in row:
        raise RewardError(f"the data has no column {name!r}, only {', '.join(sorted(row)) or 'none'}")
    return row[name]
