"""Sums of two numbers, some of them wrong: a task with verifiable answers."""

from __future__ import annotations

from functools import cached_property
from random import Random
from typing import Any

from src.data.tables import SPLITS, check_split
from src.errors import require
from src.types import PreferencePair, PromptRow

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Arithmetic:
    """All sums a + b with 0 <= a, b <= `largest`, written "17+05=" and "022", split by problem: 80, 10, 10 in 100.

    Numbers have leading zeros, so that a digit's position in the text fixes its place value: a small model learns this
    in a quarter of the steps.

    Every training problem is written `copies` times; each answer is wrong with probability `noise`, and then any other
    number from 0 to 2 `largest`. Prompts carry the correct sum as `answer`.
    """

    def __init__(self, largest: int, noise: float, copies: int, seed: int) -> None:
        require(largest >= 9, "largest", largest, "at least 9, as three splits need enough problems")
        require(0 <= noise <= 1, "noise", noise, "between 0 and 1")
        require(copies >= 1, "copies", copies, "at least 1")
        self.largest, self.noise, self.copies, self.seed = largest, noise, copies, seed

    @cached_property
    def _problems(self) -> dict[str, list[tuple[int, int]]]:
        problems = [(a, b) for a in range(self.largest + 1) for b in range(self.largest + 1)]
        Random(f"{self.seed}/split").shuffle(problems)
        ends = [round(len(problems) * sum(list(SHARES.values())[: i + 1])) for i in range(len(SPLITS))]
        return {split: problems[start:end] for split, start, end in zip(SPLITS, [0, *ends[:-1]], ends, strict=True)}

    def texts(self, split: str) -> list[str]:
        """Problems with answers: noisy and repeated in the train split, correct in the others."""
        check_split(split)
        if split != "train":
            return [self._prompt(a, b) + self._answer(a + b) for a, b in self._problems[split]]
        rng = Random(f"{self.seed}/texts")
        return [
            self._prompt(a, b) + self._answer(self._noisy(a + b, rng)) for a, b in self._problems[split] * self.copies
        ]

    def prompts(self, split: str) -> list[PromptRow]:
        """Problems to solve."""
        check_split(split)
        return [PromptRow(self._prompt(a, b), {"answer": self._answer(a + b)}) for a, b in self._problems[split]]

    def pairs(self, split: str) -> list[PreferencePair]:
        """The correct answer against a wrong one."""
        check_split(split)
        rng = Random(f"{self.seed}/pairs/{split}")
        return [
            PreferencePair(
                prompt=self._prompt(a, b), chosen=self._answer(a + b), rejected=self._answer(self._wrong(a + b, rng))
            )
            for a, b in self._problems[split]
        ]

    def quality(self, texts: list[str]) -> dict[str, list[Any]]:
        """No measure: the reward is exact."""
        return {}

    def _prompt(self, a: int, b: int) -> str:
        width = len(str(self.largest))
        return f"{a:0{width}}+{b:0{width}}="

    def _answer(self, number: int) -> str:
        return f"{number:0{len(str(2 * self.largest))}}"

    def _noisy(self, answer: int, rng: Random) -> int:
        return self._wrong(answer, rng) if rng.random() < self.noise else answer

    def _wrong(self, answer: int, rng: Random) -> int:
        other = rng.randrange(2 * self.largest)  # one number fewer, as the correct one is left out
        return other + (other >= answer)
