"""From one score per sequence to one reward per token."""

from __future__ import annotations

import torch

from src.core.masking import last_counted, masked
from src.core.shapes import Flags, Mask, PerSequence, PerToken


def token_rewards(scores: PerSequence, credit: PerToken, kl: PerToken, mask: Mask, kl_coef: float) -> PerToken:
    """r_t = credit_t - kl_coef KL_t + [t = last counted token] (score - sum_t credit_t).

    Source: InstructGPT, eq. 2 (https://arxiv.org/abs/2203.02155), where credit_t = 0. A reward that credits tokens has
    score = sum_t credit_t before shaping, which scales and clips credits with the score; the last token gets what is
    left: the shift of a normalized score, and the missing-EOS rule. It is the last *valid* action (the stop token when
    there is one), as in OpenRLHF, verl and NeMo-RL; TRL and torchtune put the score one slot later.
    Shapes: scores (B,), credit (B, T), kl (B, T) nats, mask (B, T) bool -> (B, T), 0 outside the mask. A row without
    any counted token gets no reward at all.
    """
    credit = masked(credit, mask)
    rewards = masked(-kl_coef * kl, mask)
    rest = (scores - credit.sum(dim=1)).unsqueeze(1).to(rewards)
    at_last = torch.zeros_like(rewards).scatter(1, last_counted(mask).unsqueeze(1), rest)
    return rewards + masked(at_last, mask) + credit


def set_missing_eos(scores: PerSequence, finished: Flags, value: float) -> PerSequence:
    """The score where the response ended by itself, else `value`, whatever the score was.

    Source: OpenAI's "learning to summarize", as in the N+ details (https://arxiv.org/abs/2403.17031). Shapes: (B,).
    """
    return torch.where(finished, scores, torch.full_like(scores, value))


def subtract_missing_eos(scores: PerSequence, finished: Flags, value: float) -> PerSequence:
    """The score where the response ended by itself, else score - value (TRL's `missing_eos_penalty`). Shapes: (B,)."""
    return torch.where(finished, scores, scores - value)
