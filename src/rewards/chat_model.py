"""Numbers read from the answers of a chat model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.errors import require
from src.rewards.answer_cache import AnswerCache
from src.rewards.request import BadAnswerError, Body, NoAnswerError, Service

log = logging.getLogger(__name__)


class ChatModel:
    """Asks each distinct question once and reads a number from its answer, the last match of `pattern`'s group.

    `cache` is a file that keeps usable answers for other runs; null: they are kept while this process lives.
    """

    def __init__(
        self, url: str, model: str, temperature: float, max_tokens: int, pattern: str, cache: str | None,
        timeout: float, patience: float, attempts: int, concurrency: int, token_variable: str,
    ) -> None:  # fmt: skip
        require(temperature >= 0, "temperature", temperature, "at least 0")
        require(max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
        self.service = Service("judge", url, timeout, patience, attempts, concurrency, token_variable)
        self.options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.pattern, self.cache = re.compile(pattern), AnswerCache(cache)
        require(self.pattern.groups == 1, "pattern", pattern, "a regular expression with one group")
        self.requests, self.tokens = 0, 0  # since `cost` was asked

    def numbers(self, questions: list[str], number: Callable[[str], float]) -> list[float]:
        """`number` of what the pattern finds in each answer; NaN where there is none that can be used.

        `number` raises `BadAnswerError`. Raises `RewardError` when no question has a usable answer.
        """
        bodies = {text: self.options | {"messages": [{"role": "user", "content": text}]} for text in questions}
        found = {text: self._kept(body, number) for text, body in bodies.items()}
        left = [text for text, value in found.items() if value is None]

        def read(answer: Any, body: Body) -> float:
            self.requests += 1
            self.tokens += tokens_in(answer)
            text = text_in(answer)
            value = self._value(text, number)
            self.cache.add([self.service.url, body], text)
            return value

        answers = self.service.ask_each([bodies[text] for text in left], read, _about)
        failed = [answer for answer in answers if isinstance(answer, NoAnswerError)]
        if failed and len(failed) == len(found):
            raise failed[0]
        if failed:
            log.warning(f"{len(failed)} of {len(found)} questions have no usable answer; the first: {failed[0]}")
        given = found | dict(zip(left, answers, strict=True))
        return [float("nan") if isinstance(x := given[text], NoAnswerError) or x is None else x for text in questions]

    def cost(self, rows: int) -> dict[str, Tensor]:
        """Requests answered and tokens used, as the server counts them, since the last call; (rows,) equal shares."""
        requests, tokens, self.requests, self.tokens = self.requests, self.tokens, 0, 0
        shares = {"requests": requests, "tokens": tokens}
        return {name: torch.full((rows,), total / max(1, rows)) for name, total in shares.items()}

    def _kept(self, body: Body, number: Callable[[str], float]) -> float | None:
        """The number of an answer that is kept; None without one, or where it was kept for another pattern."""
        text = self.cache.get([self.service.url, body])
        try:
            return None if text is None else self._value(text, number)
        except BadAnswerError:
            return None

    def _value(self, text: str, number: Callable[[str], float]) -> float:
        found = self.pattern.findall(text)
        if not found:
            raise BadAnswerError(f"nothing matches the pattern in {text[-80:]!r}")
        return number(found[-1])


def tokens_in(answer: Any) -> int:
    """The tokens that an answer says it used; 0 where it says nothing."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def text_in(answer: Any) -> str:
    """The text of a chat completion. Raises `BadAnswerError` for a refusal and for anything else."""
    try:
        message = answer["choices"][0]["message"]
        refusal, text = message.get("refusal"), message.get("content")
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise BadAnswerError(f"no chat completion but {str(answer)[:80]!r}") from error
    if refusal:
        raise BadAnswerError(f"refused: {str(refusal)[:80]!r}")
    if not isinstance(text, str):
        raise BadAnswerError(f"no text but {text!r:.80}")
    return text


def _about(body: Body) -> str:
    return f"for the question that ends in {body['messages'][0]['content'][-80:]!r}"
