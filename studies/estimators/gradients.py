"""All estimators on the same rollouts: norm, variance and direction of their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.core.estimators import Estimator
from src.types import Episodes
from src.utils.statistics import Figure, bootstrap_mean


class EveryEstimator(Estimator):
    """Returns the advantages of `main` and keeps those of all `estimators` for the same batch."""

    needs_values = needs_groups = needs_greedy = True

    def __init__(self, main: Estimator, estimators: dict[str, Estimator]) -> None:
        self.main, self.estimators = main, estimators
        self.latest: dict[str, Tensor] = {}

    def advantages(self, episodes: Episodes) -> Tensor:
        """Those of `main`."""
        return self.main.advantages(episodes)

    def returns(self, episodes: Episodes) -> Tensor | None:
        """Those of `main`."""
        return self.main.returns(episodes)

    def update(self, episodes: Episodes) -> None:
        """Keep Phi_t, (B, T), of each estimator."""
        self.main.update(episodes)
        for name, estimator in self.estimators.items():
            self.latest[name] = estimator.advantages(episodes)
            estimator.update(episodes)

    def state_dict(self) -> dict[str, Any]:
        """The states of all estimators."""
        states = {name: estimator.state_dict() for name, estimator in self.estimators.items()}
        return {"main": self.main.state_dict(), "estimators": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the states."""
        for name, estimator in self.estimators.items():
            estimator.load_state_dict(state["estimators"][name])
        self.main.load_state_dict(state["main"])


def compare(gradients: dict[str, Tensor], truth: str) -> dict[str, dict[str, Figure]]:
    """Variance, norm, noise and direction of each estimator's gradient, from N independent batches.

    variance: mean_n |g_n - mean g|^2 N / (N - 1), the trace of the covariance of one batch's estimate;
    norm: |E g|, with the unbiased |mean g|^2 - variance / N as its square, 0 if that is negative;
    noise: variance / norm^2, invariant to the estimator's scale, infinite where the norm is 0;
    cosine: mean_n cos(g_n, m_n), with m_n the mean of the *other* batches' gradients by `truth`, an unbiased estimator.
    Shapes: gradients (N, P) -> figures with 95% bootstrap intervals over the batches, but for the norm and the noise.
    """
    target = gradients[truth]
    others = (target.sum(dim=0) - target) / (len(target) - 1)
    return {name: _figures(g, others) for name, g in gradients.items()}


def _figures(g: Tensor, others: Tensor) -> dict[str, Figure]:
    count = len(g)
    mean = g.mean(dim=0)
    deviations = (g - mean).square().sum(dim=1) * count / (count - 1)
    variance = deviations.mean().item()
    squared = max(mean.square().sum().item() - variance / count, 0.0)
    return {
        "variance": bootstrap_mean(deviations.tolist()),
        "norm": Figure(math.sqrt(squared), count, None),
        "noise": Figure(variance / squared if squared else math.inf, count, None),
        "cosine": bootstrap_mean(torch.cosine_similarity(g, others, dim=1).tolist()),
    }


def policy_gradients(
    logprobs_and_weights: Iterator[tuple[Tensor, Tensor, slice | Tensor]],
    credits: dict[str, Tensor],
    parameters: list[torch.nn.Parameter],
) -> dict[str, Tensor]:
    """sum_t w_t Phi_t grad log pi(a_t | s_t) for every estimator, each (P,), from one forward pass per micro-batch.

    The iterator yields, for each micro-batch, logprobs (N, T'), weights (N, T') and the indices of its rows.
    """
    totals = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in credits}
    for logprobs, weights, rows in logprobs_and_weights:
        for name, phi in credits.items():
            objective = (weights * phi[rows, : logprobs.shape[1]] * logprobs).sum()
            pieces = torch.autograd.grad(objective, parameters, retain_graph=True, materialize_grads=True)
            totals[name] += torch.cat([piece.reshape(-1).float().cpu() for piece in pieces])
    return totals
