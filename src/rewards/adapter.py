"""A reward model that is an adapter on the policy's own base."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import require
from src.models.loading import readable_length
from src.models.reward_adapter import adapter_folder, load_adapter
from src.models.roles import Roles
from src.models.text import shorten
from src.rewards.learned import LearnedReward, score_rows
from src.types import Rollout


class AdapterReward:
    """Scores the token ids of prompt + response + end token with the role "reward" of the shared base.

    The end token is appended where a response did not end by itself, as in `LearnedReward`. `attach` must come first.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        adapter_folder(path)
        self.path, self.batch_size = path, batch_size
        self.roles: Roles | None = None

    def attach(self, roles: Roles) -> None:
        """Load the adapter onto the base of `roles`. Raises `ModelError` when it was trained on another one."""
        roles.add_reward(load_adapter(self.path))
        self.roles = roles

    def standalone(self) -> LearnedReward:
        """The same reward model with its base merged in, which lies beside its adapter, for models of other bases."""
        return LearnedReward(str(adapter_folder(self.path).parent / "model"), self.batch_size)

    @torch.no_grad()
    def score_rollout(self, rollout: Rollout) -> Tensor:
        """r(x, y), (B,) float32; a text longer than the model can read loses its beginning."""
        if self.roles is None:
            raise RuntimeError("reward=adapter is not attached to the roles whose base it reads with")
        tokenizer, device = self.roles.tokenizer, rollout.response_ids.device
        with self.roles.acting("reward") as lm:
            limit = readable_length(lm.config, tokenizer)
        rows = [shorten(row, limit, tokenizer) for row in token_rows(rollout, tokenizer.eos_token_id)]
        return score_rows(self.roles.scores, rows, tokenizer.pad_token_id, self.batch_size, device).to(device)


def token_rows(rollout: Rollout, end: int) -> list[list[int]]:
    """The counted tokens of prompt and response, ended by exactly one end token."""
    parts = zip(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask, strict=True)
    rows = [[*p[pm].tolist(), *r[rm].tolist()] for p, pm, r, rm in parts]
    return [row if row[-1] == end else [*row, end] for row in rows]
