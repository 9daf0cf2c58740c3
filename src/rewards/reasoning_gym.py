"""The verifier of a task of reasoning-gym as a reward."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from src.errors import require
from src.rewards.verifiers import column
from src.utils.gym import task_of


class TaskVerifier:
    """What the verifier of a prompt's task gives the answer in a response, from 0 to 1; 0 without an answer.

    The answer is the last match of `pattern`'s group; the whole response, stripped, without a pattern. A response on
    which the verifier itself fails scores 0 and is counted. Logged apart: `right`, the share of full marks;
    `without_answer`, of responses that the pattern does not match; `failed`, of those the verifier fails on.
    """

    def __init__(self, pattern: str | None = None) -> None:
        self.verifiers: dict[str, Any] = {}  # by task and parameters
        self.pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        groups = 1 if self.pattern is None else self.pattern.groups
        require(groups == 1, "pattern", pattern, "a regular expression with one group, or null")

    def score_parts(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """(B,) each. Raises `RewardError` for rows that are not of `data=reasoning_gym`."""
        rows = [self._mark(text, row) for text, row in zip(responses, metadata, strict=True)]
        mark, without, failed = torch.tensor(rows).T
        return {"mark": mark, "right": (mark == 1).float(), "without_answer": without, "failed": failed}

    def combine(self, parts: dict[str, Tensor]) -> Tensor:
        """The verifier's mark, (B,)."""
        return parts["mark"]

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """The verifier's mark, (B,)."""
        return self.combine(self.score_parts(prompts, responses, metadata))

    def _mark(self, response: str, row: dict[str, Any]) -> tuple[float, float, float]:
        """(mark, 1 without an answer, 1 if the verifier failed)."""
        entry, answer = column(row, "entry"), self._answer(response)
        verifier = self._verifier(column(row, "task"), column(row, "params"))
        if answer is None:
            return 0.0, 1.0, 0.0
        try:
            return float(verifier.score_answer(answer, entry)), 0.0, 0.0
        except Exception:  # whatever a task's parser raises on an answer that it does not expect
            return 0.0, 0.0, 1.0

    def _verifier(self, task: str, params: dict[str, Any] | None) -> Any:
        key = f"{task} {params}"
        if key not in self.verifiers:
            self.verifiers[key] = task_of(task, params)
        return self.verifiers[key]

    def _answer(self, response: str) -> str | None:
        if self.pattern is None:
            return response.strip() or None
        found = self.pattern.findall(response)
        return found[-1].strip() if found else None
