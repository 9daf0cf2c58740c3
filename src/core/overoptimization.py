"""How a true score answers to optimizing a proxy of it."""

from __future__ import annotations

import math

import torch

from src.core.shapes import Row


def gao_form(distance: Row, alpha: float, beta: float) -> Row:
    """R(d) = d (alpha - beta log d), 0 at d = 0: how far the gold score improves at d = sqrt(KL(policy || ref)).

    Source: Gao, Schulman & Hilton, section 3 (https://arxiv.org/abs/2210.10760), the form for reinforcement learning.
    Shapes: (N,) -> (N,).
    """
    return distance * alpha - beta * torch.xlogy(distance, distance)


def fit_gao_form(distance: Row, improvement: Row) -> tuple[float, float]:
    """(alpha, beta) of the least squares fit of `gao_form`, which is linear in both.

    Shapes: (N,), (N,) with at least two different distances above 0. Raises `ValueError` for fewer.
    """
    if len(set(distance[distance > 0].tolist())) < 2:
        raise ValueError("a fit needs at least two different distances above 0")
    terms = torch.stack([distance, -torch.xlogy(distance, distance)], dim=1).double()
    alpha, beta = torch.linalg.lstsq(terms, improvement.double().unsqueeze(1)).solution.flatten().tolist()
    return alpha, beta


def turning_point(alpha: float, beta: float) -> float | None:
    """The distance exp(alpha / beta - 1) at which R is largest; None where it never turns (beta <= 0)."""
    return math.exp(alpha / beta - 1) if beta > 0 else None
