"""Rewards as people write them on a bad day."""

from __future__ import annotations

from typing import Any

Given = tuple[list[str], list[str], list[dict[str, Any]]]


def nothing(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> None:
    """A forgotten return."""


def two(prompts: list[str], responses: list[str]) -> list[float]:
    """One parameter less."""
    return [0.5] * len(prompts)


def raises(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A mistake in the code."""
    return [row["stars"] for row in metadata]


def not_a_number(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """0 / 0 of somebody's own."""
    return [float("nan")] * len(prompts)


def one_score(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """One for all, where each needs its own."""
    return [0.5]


def words(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[str]:
    """Opinions instead of numbers."""
    return ["good"] * len(prompts)


def sleeps(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """No answer for a while."""
    import time

    time.sleep(3)
    return [0.0] * len(prompts)
