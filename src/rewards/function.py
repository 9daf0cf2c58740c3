"""Any Python function as the reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class FunctionReward:
    """r(x, y) = function(prompts, responses, metadata), one number per response, in the order given.

    `metadata` holds the other columns of each prompt's data row and `finished`.
    """

    def __init__(self, target: str, function: Callable[..., Tensor | Sequence[float]]) -> None:
        self.target, self.function = target, function  # its dotted path, its name in messages

    def score(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor | Sequence[float]:
        """The function's scores."""
        return self.function(prompts, responses, metadata)
