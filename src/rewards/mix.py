"""A weighted mean of rewards, each logged separately."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import require
from src.models.roles import Roles
from src.rewards.answers import as_numbers
from src.types import LoadedReward, Reward


class MixReward(nn.Module):
    """r = sum_i w_i r_i / sum_i |w_i|: a weighted mean if no weight is negative."""

    def __init__(self, parts: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        super().__init__()
        require(len(parts) > 0, "parts", dict(parts), "a mapping of at least one name to a reward")
        require(set(parts) == set(weights), "weights", dict(weights), f"one number for each of {', '.join(parts)}")
        require(any(weights.values()), "weights", dict(weights), "numbers of which one is not 0")
        self.parts, self.weights = dict(parts), dict(weights)
        for name, part in parts.items():
            require(hasattr(part, "score"), f"parts.{name}", type(part).__name__, "a reward that scores text")
        self.models = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})

    def load(self, roles: Roles | None = None) -> MixReward:
        """Load the parts that have weights."""
        for part in self.parts.values():
            if isinstance(part, LoadedReward):
                part.load(roles)
        return self

    def score_parts(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """The unweighted scores of each part, (B,); none sees what another did to its arguments.

        Raises for a part that gives no number.
        """
        scores: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            given = part.score(*deepcopy((prompts, responses, metadata)))
            numbers, others = as_numbers(part, given, torch.Size([len(prompts)]))
            for element in others.values():
                raise ValueError(f"parts.{name} gave {element!r:.80}, which is no number")
            scores[name] = numbers.cpu()
        return scores

    def combine(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted mean of the parts, (B,)."""
        total = sum(abs(weight) for weight in self.weights.values())
        return torch.stack([self.weights[name] / total * scores for name, scores in parts.items()]).sum(dim=0)

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """The weighted mean, (B,)."""
        return self.combine(self.score_parts(prompts, responses, metadata))
