"""Learning a reward from comparisons: P(chosen preferred) = sigmoid(r_chosen - r_rejected)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """L = -log sigmoid(r_w - r_l) per pair; log 2 at a tie, finite at any difference.

    Source: Bradley-Terry, as in InstructGPT, eq. 1 (https://arxiv.org/abs/2203.02155). Shapes: (B,) -> (B,).
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def pairwise_accuracy(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """1 where the chosen one scores higher, 0.5 at a tie, else 0. Shapes: (B,) -> (B,)."""
    return 0.5 * (1 + (chosen_scores - rejected_scores).sign())
