"""Repetition within a text, and diversity of a set of texts."""

from __future__ import annotations

from collections.abc import Sequence


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text, whose words are separated by spaces."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float:
    """1 - distinct / all n-grams of a text: 0 where none repeats, and for texts of fewer than n words.

    Source: "rep-n" of Welleck et al. (https://arxiv.org/abs/1908.04319).
    """
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """distinct / all n-grams of a set of texts; 0 where there are none.

    Source: "distinct-n" of Li et al. (https://arxiv.org/abs/1510.03055).
    """
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0
