"""Rules on the text of a response: words, length, patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from src.errors import require


class KeywordReward:
    """Mean over `keywords` of [the response contains it as a word, in any case]; 1 if it contains all of them."""

    def __init__(self, keywords: Sequence[str]) -> None:
        words = [] if isinstance(keywords, str) else list(keywords)  # a string would be read as a list of letters
        ok = len(words) > 0 and all(isinstance(word, str) and word for word in words)
        require(ok, "keywords", keywords, "a list of at least one word")
        self.patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in words]

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """The share of the keywords in each response."""
        return [sum(bool(p.search(text)) for p in self.patterns) / len(self.patterns) for text in responses]


class LengthReward:
    """-|words - target| / target: 0 at `target_words` words, -1 for an empty response."""

    def __init__(self, target_words: int) -> None:
        require(target_words >= 1, "target_words", target_words, "at least 1")
        self.target_words = target_words

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """The relative distance of each response from the target length, negated."""
        return [-abs(len(text.split()) - self.target_words) / self.target_words for text in responses]


class RegexReward:
    """`match_score` if the pattern is found in the response (with `whole`: matches all of it), else `else_score`."""

    def __init__(self, pattern: str, whole: bool, match_score: float, else_score: float) -> None:
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            require(False, "pattern", pattern, f"a regular expression of Python's re ({error})")
        self.find = compiled.fullmatch if whole else compiled.search
        self.match_score, self.else_score = match_score, else_score

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """One of the two scores per response."""
        return [self.match_score if self.find(text) else self.else_score for text in responses]
