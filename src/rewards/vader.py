"""VADER: sentiment by a lexicon rated by people (Hutto and Gilbert, 2014; package vaderSentiment)."""

from __future__ import annotations

from functools import cached_property
from typing import Any


class Vader:
    """The compound sentiment of prompt + response, from -1 (most negative) to 1 (most positive)."""

    @cached_property
    def _analyzer(self) -> Any:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # slow to import

        return SentimentIntensityAnalyzer()

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """One compound score per text."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]
