"""Learning a reward from comparisons: P(chosen preferred) = sigmoid(r_chosen - r_rejected)."""

from __future__ import annotations

import torch.nn.functional as F

from src.core.shapes import PerSequence, Row, Scalar


def pairwise_loss(
    chosen_scores: PerSequence, rejected_scores: PerSequence, margin: PerSequence | float = 0.0
) -> PerSequence:
    """L = -log sigmoid(r_w - r_l - m) per pair; log 2 at a difference of m, finite at any difference.

    Source: Bradley-Terry, as in InstructGPT, eq. 1 (https://arxiv.org/abs/2203.02155), there with m = 0; the margin m
    as in Llama 2, eq. 2 (https://arxiv.org/abs/2307.09288). Shapes: (B,) -> (B,).
    """
    return -F.logsigmoid(chosen_scores - rejected_scores - margin)


def centering(chosen_scores: PerSequence, rejected_scores: PerSequence) -> PerSequence:
    """(r_w + r_l)^2 per pair: pulls scores, which the pairwise loss leaves free to drift together, toward 0.

    Source: Eisenstein et al., section 2 (https://arxiv.org/abs/2312.09244). Shapes: (B,) -> (B,).
    """
    return (chosen_scores + rejected_scores).square()


def pairwise_accuracy(chosen_scores: PerSequence, rejected_scores: PerSequence) -> PerSequence:
    """1 where the chosen one scores higher, 0.5 at a tie, else 0. Shapes: (B,) -> (B,)."""
    return 0.5 * (1 + (chosen_scores - rejected_scores).sign())


def imitation(chosen_logprobs: Row) -> Scalar:
    """-(1 / N) sum log p(y_t | x, y_<t) over the N tokens of the chosen responses of a batch; 0 when there are none.

    Added to the pairwise loss with a coefficient: the model stays a model of language. Source: "Secrets of RLHF
    in Large Language Models, Part I", eq. 3 (https://arxiv.org/abs/2307.04964); the same idea is studied as "text
    generation regularization" in https://arxiv.org/abs/2406.10216, section 3.2. Shapes: (N,) nats -> scalar.
    """
    return -chosen_logprobs.sum() / max(chosen_logprobs.numel(), 1)
