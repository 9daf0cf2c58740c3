"""A reward computed by another process, over HTTP."""

from __future__ import annotations

from typing import Any

from src.errors import require
from src.rewards.request import BadAnswerError, Body, Service


class HttpReward:
    """Posts {"query": prompt + response, "prompts", "labels"} and reads {"rewards": one number per query}.

    The protocol of OpenRLHF's remote reward models. Texts are sent in pieces of `batch_size`; `Service` describes the
    other settings.
    """

    def __init__(
        self, url: str, timeout: float, patience: float, attempts: int, concurrency: int, batch_size: int,
        label_column: str, token_variable: str,
    ) -> None:  # fmt: skip
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.service = Service("reward server", url, timeout, patience, attempts, concurrency, token_variable)
        self.batch_size, self.label_column = batch_size, label_column

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """One number per text. Raises `RewardError` when a piece got no scores."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        labels = [row.get(self.label_column, "") for row in metadata]
        pieces = [slice(start, start + self.batch_size) for start in range(0, len(texts), self.batch_size)]
        bodies = [{"query": texts[p], "prompts": prompts[p], "labels": labels[p]} for p in pieces]
        return [score for piece in self.service.ask(bodies, scores_in, _about) for score in piece]


def scores_in(answer: Any, body: Body) -> list[float]:
    """The scores of an answer. Raises `BadAnswerError` unless it holds one number per query."""
    try:
        scores = answer["rewards"]
    except (KeyError, TypeError) as error:
        raise BadAnswerError(f'no {{"rewards": [...]}} but {str(answer)[:80]!r}') from error
    wanted = len(body["query"])
    if not isinstance(scores, list) or len(scores) != wanted:
        raise BadAnswerError(f"{len(scores) if isinstance(scores, list) else scores!r} scores for {wanted} texts")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
        raise BadAnswerError(f"a score that is not a number: {scores[:5]!r}")
    return [float(score) for score in scores]


def _about(body: Body) -> str:
    return f"for {len(body['query'])} texts, the first of them {body['query'][0][:80]!r}"
