"""A reward computed by another process, over HTTP."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from src.errors import RewardError, require
from src.rewards.request import BadAnswerError, Body, Service


class HttpReward:
    """Posts {"query": prompt + response, "prompts", "labels"} and reads {"rewards": one number per query}.

    The protocol of OpenRLHF's remote reward models. An answer may also have {"scores": one number per query} and
    {"extra_logs": {NAME: one number per query}}, which are logged as rollout/score_NAME. Texts are sent in pieces of
    `batch_size`; `Service` describes the other settings.
    """

    def __init__(
        self, url: str, timeout: float, patience: float, attempts: int, concurrency: int, batch_size: int,
        label_column: str, token_variable: str,
    ) -> None:  # fmt: skip
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.service = Service("reward server", url, timeout, patience, attempts, concurrency, token_variable)
        self.batch_size, self.label_column = batch_size, label_column

    def score_parts(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """The parts of the answers, (B,) each. Raises `RewardError` when a piece got no scores, or other parts."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        labels = [row.get(self.label_column, "") for row in metadata]
        pieces = [slice(start, start + self.batch_size) for start in range(0, len(texts), self.batch_size)]
        bodies = [{"query": texts[p], "prompts": prompts[p], "labels": labels[p]} for p in pieces]
        answers = self.service.ask(bodies, parts_in, _about)
        names = answers[0] if answers else {"rewards": []}
        for other in answers:
            if set(other) != set(names):
                raise RewardError(
                    f"reward server {self.service.url}: one answer has {', '.join(names)}, another {', '.join(other)}"
                )
        return {n: torch.tensor([x for a in answers for x in a[n]], dtype=torch.float64) for n in names}

    def combine(self, parts: dict[str, Tensor]) -> Tensor:
        """The rewards, (B,)."""
        return parts["rewards"]

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """One number per text. Raises `RewardError` when a piece got no scores."""
        rewards: list[float] = self.score_parts(prompts, responses, metadata)["rewards"].tolist()
        return rewards


def parts_in(answer: Any, body: Body) -> dict[str, list[float]]:
    """The rewards of an answer, and what else it has for each query: `scores`, and `extra_logs` by name.

    Raises `BadAnswerError` unless each has one number per query.
    """
    try:
        parts = {"rewards": answer["rewards"]}
    except (KeyError, TypeError) as error:
        raise BadAnswerError(f'no {{"rewards": [...]}} but {str(answer)[:80]!r}') from error
    extra = answer.get("extra_logs") or {}
    if not isinstance(extra, dict) or not all(re.fullmatch(r"[\w.-]+", name) for name in extra):
        raise BadAnswerError(f"extra_logs are no numbers by name: {str(extra)[:80]!r}")
    scores = {} if answer.get("scores") is None else {"scores": answer["scores"]}
    return {name: _numbers(name, given, len(body["query"])) for name, given in (extra | scores | parts).items()}


def _numbers(name: str, given: Any, wanted: int) -> list[float]:
    of = "" if name == "rewards" else f" in {name}"
    if not isinstance(given, list) or len(given) != wanted:
        raise BadAnswerError(f"{len(given) if isinstance(given, list) else given!r} scores for {wanted} texts{of}")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in given):
        raise BadAnswerError(f"a score that is not a number{of}: {given[:5]!r}")
    return [float(score) for score in given]


def _about(body: Body) -> str:
    return f"for {len(body['query'])} texts, the first of them {body['query'][0][:80]!r}"
