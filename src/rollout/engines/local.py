"""The engine of this process: the policy that trains is the one that samples."""

from __future__ import annotations

from typing import ClassVar

import torch

from src.models.roles import Roles
from src.rollout.answering import Responses, sampled
from src.rollout.sampling import Sampler
from src.types import Prompts
from src.utils.distributed import RowShard


class LocalEngine:
    """Draws with the policy itself."""

    fault: ClassVar[str] = (
        "its cache does not keep the past exactly, so this model cannot be sampled and is not trained"
    )

    def check(self) -> None:
        """Whatever can train can sample."""

    def take(self, roles: Roles, policy_version: int) -> None:
        """There is one copy of the weights, which is the policy."""

    def sample(
        self, roles: Roles, prompts: Prompts, sampler: Sampler, draws: torch.Generator, share: RowShard
    ) -> Responses:
        """The policy's responses."""
        return sampled(roles, "policy", prompts, sampler, draws, share)

    def close(self) -> None:
        """There is nothing to let go of."""
