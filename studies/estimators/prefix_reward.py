"""A reward per token from any reward: by how much each token raises the score of the text so far."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.models.text import response_text
from src.types import Reward, Rollout


class PrefixGain:
    """r_t = score(x, y_1..t) - score(x, y_1..t-1): dense, and its sum telescopes to score(x, y) - score(x, "").

    A potential-based shaping of the terminal reward, so the optimal policies stay the same. Source: Ng, Harada &
    Russell 1999 (https://people.eecs.berkeley.edu/~russell/papers/icml99-shaping.pdf).
    """

    def __init__(self, reward: Reward, tokenizer: PreTrainedTokenizerBase) -> None:
        self.reward, self.tokenizer = reward, tokenizer

    def score_tokens(self, rollout: Rollout) -> Tensor:
        """r_t, (B, T), 0 outside the mask; every prefix of every response is scored once."""
        prompts, responses, metadata = [], [], []
        lengths = rollout.response_mask.sum(dim=1).tolist()
        for row, length in enumerate(lengths):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            counted = rollout.response_ids[row][rollout.response_mask[row]]
            for end in range(length + 1):
                prompts.append(rollout.prompts[row])
                responses.append(response_text(self.tokenizer, prompt, counted[:end]) if end else "")
                ended = end == length and bool(rollout.finished[row])
                metadata.append(rollout.metadata[row] | {"finished": ended})
        scores = torch.as_tensor(self.reward.score(prompts, responses, metadata), dtype=torch.float32)
        gains = [piece.diff() for piece in scores.split([length + 1 for length in lengths])]
        dense = torch.zeros(rollout.response_mask.shape)
        dense = dense.masked_scatter(rollout.response_mask.cpu(), torch.cat(gains))
        return dense.to(rollout.response_mask.device)
