"""From one score per sequence to one reward per token: r_t = [t is last] * score - kl_coef * KL_t."""

from __future__ import annotations

import torch
from torch import Tensor

from src.core.masking import last_counted, masked


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * KL_t + [t = last counted token] * score.

    Source: InstructGPT, eq. 2 (https://arxiv.org/abs/2203.02155). The score sits on the last *valid* action (the stop
    token when there is one), as in OpenRLHF, verl and torchtune; TRL puts it one slot later.
    Shapes: scores (B,), kl (B, T) nats, mask (B, T) bool -> (B, T), 0 outside the mask. A row without any counted
    token gets no reward at all.
    """
    rewards = masked(-kl_coef * kl, mask)
    at_last = torch.zeros_like(rewards).scatter(1, last_counted(mask).unsqueeze(1), scores.unsqueeze(1).to(rewards))
    return rewards + masked(at_last, mask)


def set_missing_eos(scores: Tensor, finished: Tensor, value: float) -> Tensor:
    """The score where the response ended by itself, else `value`, whatever the score was.

    Source: OpenAI's "learning to summarize", as in the N+ details (https://arxiv.org/abs/2403.17031). Shapes: (B,).
    """
    return torch.where(finished, scores, torch.full_like(scores, value))


def subtract_missing_eos(scores: Tensor, finished: Tensor, value: float) -> Tensor:
    """The score where the response ended by itself, else score - value (TRL's `missing_eos_penalty`). Shapes: (B,)."""
    return torch.where(finished, scores, scores - value)
