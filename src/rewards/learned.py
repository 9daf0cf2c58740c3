"""A reward model: a sequence classifier with one output and a tokenizer of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.core.checks import require
from src.core.padding import pad_left
from src.models.forward import sequence_scores
from src.models.loading import load_reward_model
from src.models.text import encode_with_end


class LearnedReward(nn.Module):
    """Scores prompt + response + end token, read at the end token; frozen and always in eval mode.

    The end token is appended whether or not the response ended by itself: the model never saw a text without one. What
    an unfinished response costs is the missing-EOS rule's business.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.model, self.tokenizer = load_reward_model(path)
        self.batch_size = batch_size
        self.eval()

    def train(self, mode: bool = True) -> LearnedReward:
        """Stay in eval mode, whatever the Trainer asks for."""
        return super().train(False)

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """r(x, y), (B,) float32."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return score_texts(self.model, self.tokenizer, texts, self.batch_size)


@torch.no_grad()
def score_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_size: int
) -> Tensor:
    """The score of each text with an end token, (N,) float32 on the CPU; texts of similar length share a batch."""
    rows = encode_with_end(tokenizer, texts)
    scores = torch.empty(len(rows))
    for index in torch.tensor([len(row) for row in rows]).argsort(stable=True).split(batch_size):
        ids, mask = pad_left([rows[i] for i in index.tolist()], tokenizer.pad_token_id)
        scores[index] = sequence_scores(model, ids.to(model.device), mask.to(model.device)).float().cpu()
    return scores
