"""A reward model: a sequence classifier with one output and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.core.padding import pad_left
from src.errors import ModelError, require
from src.models.fingerprint import joint, tokenizer_fingerprint
from src.models.forward import sequence_scores
from src.models.loading import load_reward_model, readable_length
from src.models.reward_net import CHAT_KEY
from src.models.roles import Roles
from src.models.scalar_head import score_bias
from src.models.text import encode_completions, shorten


class LearnedReward(nn.Module):
    """Scores prompt + response + end token, read at the end token; frozen and always in eval mode. Call `load` first.

    The end token is also appended to unfinished responses, as the model was trained on texts with one; the missing-EOS
    rule (`src.rollout.shaping`) changes their scores.
    """

    def __init__(self, path: str, batch_size: int = 256) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.path, self.batch_size = path, batch_size

    def load(self, roles: Roles | None = None) -> LearnedReward:
        """Load weights and tokenizer, once. Raises `ModelError` for a folder without a trained reward model."""
        if not hasattr(self, "model"):
            self.model, self.tokenizer = load_reward_model(self.path, roles is None or roles.fast_cpu)
            self.eval()
        return self

    @property
    def chat(self) -> bool:
        """Whether the texts are formatted with the tokenizer's chat template."""
        return bool(getattr(self.model.config, CHAT_KEY, False))

    @property
    def limit(self) -> int | None:
        """The largest number of tokens that are read of a text."""
        return readable_length(self.model.config, self.tokenizer)

    def reading(self) -> str:
        """The fingerprint of what determines a score besides weights: tokenizer, chat template, length, added bias."""
        return joint(tokenizer_fingerprint(self.tokenizer), self.chat, self.limit, score_bias(self.model))

    def train(self, mode: bool = True) -> LearnedReward:
        """Stay in eval mode; the Trainer's call has no effect."""
        return super().train(False)

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """r(x, y), (B,) float32; a text longer than the model's context loses its beginning."""
        if not hasattr(self, "model"):
            raise ModelError("the learned reward is not loaded: call load() first")
        rows = encode_completions(self.tokenizer, prompts, responses, self.chat)
        rows = [shorten(row, self.limit, self.tokenizer) for row in rows]
        score, bias = partial(sequence_scores, self.model), score_bias(self.model)
        return score_rows(score, rows, self.tokenizer.pad_token_id, self.batch_size, self.model.device) + bias


@torch.no_grad()
def score_rows(
    score: Callable[[Tensor, Tensor], Tensor], rows: list[list[int]], pad_id: int, batch_size: int, device: torch.device
) -> Tensor:
    """`score(ids, mask)` of each row of tokens, (N,) float32 on the CPU; rows of similar length share a batch."""
    scores = torch.empty(len(rows))
    for index in torch.tensor([len(row) for row in rows]).argsort(stable=True).split(batch_size):
        ids, mask = pad_left([rows[i] for i in index.tolist()], pad_id)
        scores[index] = score(ids.to(device), mask.to(device)).float().cpu()
    return scores
