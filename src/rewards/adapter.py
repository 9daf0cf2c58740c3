"""A reward model that is an adapter on the policy's base."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import ModelError, require
from src.models.endings import Endings
from src.models.loading import readable_length
from src.models.reward_adapter import adapter_folder, load_adapter
from src.models.roles import Roles
from src.models.text import shorten
from src.rewards.learned import LearnedReward, score_rows
from src.types import Rollout


class AdapterReward:
    """Scores the token ids of prompt + response + end token with the role "reward" of the shared base.

    The end token is appended if a response did not end by itself, as in `LearnedReward`. Call `load` first.
    """

    def __init__(self, path: str, batch_size: int = 64) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        adapter_folder(path)
        self.path, self.batch_size = path, batch_size
        self.roles: Roles | None = None

    def load(self, roles: Roles | None) -> AdapterReward:
        """Add the adapter to the base of `roles`. Raises `ModelError` when it was trained on another base."""
        if roles is None:
            raise ModelError("reward=adapter needs the policy's base: use reward=learned with its model/ folder")
        roles.add_reward(load_adapter(self.path))
        self.roles = roles
        return self

    def standalone(self) -> LearnedReward:
        """The same reward model merged into its base, from the folder next to its adapter, for use with other bases."""
        return LearnedReward(str(adapter_folder(self.path).parent / "model"), self.batch_size)

    @torch.no_grad()
    def score_rollout(self, rollout: Rollout) -> Tensor:
        """r(x, y), (B,) float32; a text longer than the model's context loses its beginning."""
        if self.roles is None:
            raise ModelError("the adapter reward is not loaded: call load(roles) first")
        tokenizer, device = self.roles.tokenizer, rollout.response_ids.device
        with self.roles.acting("reward") as lm:
            limit = readable_length(lm.config, tokenizer)
        rows = [shorten(row, limit, tokenizer) for row in token_rows(rollout, self.roles.endings)]
        return score_rows(self.roles.scores, rows, tokenizer.pad_token_id, self.batch_size, device).to(device)


def token_rows(rollout: Rollout, ends: Endings) -> list[list[int]]:
    """The tokens of prompt and response in their masks, ended by exactly one end token.

    It is the one of the texts that the reward model was trained on, whichever of several ended the response.
    """
    parts = zip(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask, strict=True)
    rows = [[*p[pm].tolist(), *ends.without_end(r[rm].tolist())] for p, pm, r, rm in parts]
    return [ends.closed(row, prompt) for row, prompt in zip(rows, rollout.prompts, strict=True)]
