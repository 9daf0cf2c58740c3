"""How much a text repeats itself, and how many words a set of texts uses."""

from __future__ import annotations

from collections.abc import Sequence


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of n words of a text, words being what spaces part."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float:
    """1 - distinct / all of the n-grams of a text: 0 where nothing comes twice, and for texts of fewer than n words.

    Source: "rep-n" of Welleck et al. (https://arxiv.org/abs/1908.04319).
    """
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """distinct / all of the n-grams of a set of texts; 0 where there are none.

    Source: "distinct-n" of Li et al. (https://arxiv.org/abs/1510.03055).
    """
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0
