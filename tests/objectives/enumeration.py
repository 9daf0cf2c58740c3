"""Where an expected gradient vanishes, by enumeration of all responses; independent of the code that it judges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tests.objectives.bandit import BETA, CONSTANT, LONGEST, STATES, STOP, WORDS, Response, logits

STEPS, RATE = 3000, 1.0


def all_responses() -> list[Response]:
    """Every response: ended by STOP, or of the largest length."""
    found: list[Response] = []
    todo: list[Response] = [()]
    while todo:
        so_far = todo.pop()
        if len(so_far) == LONGEST or (so_far and so_far[-1] == STOP):
            found.append(so_far)
        else:
            todo += [(*so_far, word) for word in range(WORDS)]
    return found


@dataclass(frozen=True)
class Problem:
    """A setting: where the KL is ("reward", "loss", "both") and how it is estimated."""

    reference: Tensor  # (states, words) logits
    place: str
    kind: str

    @cached_property
    def visits(self) -> tuple[Tensor, Tensor, Tensor]:
        """State and word of each place of each response, (N, LONGEST), and which places there are."""
        rows = [[(STATES.index(response[:t]), word) for t, word in enumerate(response)] for response in all_responses()]
        filled = [[*row, *[(0, 0)] * (LONGEST - len(row))] for row in rows]
        states, words = torch.tensor(filled).unbind(-1)
        return states, words, torch.tensor([[t < len(row) for t in range(LONGEST)] for row in rows])

    def at_visits(self, table: Tensor) -> Tensor:
        """The entries of a table (states, words) at all places, 0 elsewhere: (N, LONGEST)."""
        states, words, there = self.visits
        return table[states, words].where(there, 0.0)

    @cached_property
    def scores(self) -> Tensor:
        """r(y) = beta log(pi*(y) / ref(y)) + J*, (N,)."""
        return BETA * self.at_visits(log_ratios(logits(0), self.reference)).sum(1) + CONSTANT

    def estimates(self, table: Tensor) -> Tensor:
        """The KL's estimate at each place, (N, LONGEST)."""
        d = log_ratios(table, self.reference)
        exact = (table.softmax(-1) * d).sum(-1, keepdim=True).expand_as(d)
        return self.at_visits({"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d, "exact": exact}[self.kind])

    def gradient(self, table: Tensor) -> Tensor:
        """E[sum_t -(G_t - J*) grad log pi(a_t) + beta grad KL_t]; each of its two KLs only where the setting has it."""
        table = table.detach().requires_grad_(True)
        logprobs, estimates = self.at_visits(table.log_softmax(-1)), self.estimates(table)
        shares = logprobs.sum(1).exp().detach()
        taxed = estimates.detach() if self.place in ("reward", "both") else torch.zeros_like(logprobs)
        to_go = self.scores.unsqueeze(1) - BETA * taxed.flip(1).cumsum(1).flip(1)
        losses = -logprobs * (to_go - CONSTANT)
        if self.place in ("loss", "both"):
            losses = losses + BETA * estimates
        (found,) = torch.autograd.grad((shares * losses.sum(1)).sum(), table)
        return found

    def fixed_point(self) -> Tensor | None:
        """The table at which the gradient is 0, followed from pi*; None where it runs away."""
        table = logits(0)
        for _ in range(STEPS):
            table = table - RATE * self.gradient(table)
        return table if bool(table.isfinite().all()) and float(self.gradient(table).abs().max()) < 1e-6 else None


def log_ratios(table: Tensor, other: Tensor) -> Tensor:
    """log pi - log q, (states, words)."""
    return table.log_softmax(-1) - other.log_softmax(-1)


def distance(problem: Problem, table: Tensor) -> float:
    """KL(pi || pi*) of whole responses, nats."""
    ratios = problem.at_visits(log_ratios(table, logits(0))).sum(1)
    return float((problem.at_visits(table.log_softmax(-1)).sum(1).exp() * ratios).sum())
