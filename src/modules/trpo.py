"""TRPO: one natural-gradient step of the policy per iteration, inside a bound on KL(old || new)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from src.core.aggregation import weighted_sum
from src.core.natural_gradient import conjugate_gradient, step_length
from src.errors import require
from src.models.distribution import TokenDistribution
from src.models.weights import restore, snapshot
from src.modules.objective import Texts
from src.modules.ppo import PPOModule
from src.modules.weighted_means import WeightedMeans
from src.types import Experience, select
from src.utils.distributed import all_reduce_sum, gather
from src.utils.double_backward import twice_differentiable

# micro-batches with the weights (N, T') of their tokens in the loss, and in the mean KL (equal for all tokens)
Micros = list[tuple[Experience, Tensor, Tensor]]


@dataclass(frozen=True)
class TrustRegion:
    """Limit of one step and settings of its solver."""

    max_kl: float
    damping: float
    cg_iterations: int
    backtracks: int

    def __post_init__(self) -> None:
        """Refuse an empty region and a solver that does nothing."""
        require(self.max_kl > 0, "max_kl", self.max_kl, "greater than 0 nats per token")
        require(self.damping >= 0, "damping", self.damping, "at least 0")
        require(self.cg_iterations >= 1, "cg_iterations", self.cg_iterations, "at least 1")
        require(self.backtracks >= 1, "backtracks", self.backtracks, "at least 1")


class TRPOModule(PPOModule):
    """theta <- theta + 2^-j sqrt(2 max_kl / x^T B x) x,  B x = -grad L,  B = F + damping I, the first j accepted.

    F is the Fisher matrix of the policy's adapters: the Hessian of the mean exact KL(old || new) at the old policy,
    used through its products with vectors only. A step is accepted when the measured mean KL is at most `max_kl` and
    the loss is lower than before; if none is, the policy is unchanged. The critic uses its optimizer, as in PPO. The
    KL is a mean over all tokens of the batch; the aggregation weighs the loss only.
    Source: TRPO, section 6 and appendix C (https://arxiv.org/abs/1502.05477).
    """

    def __init__(self, *ppo: Any, trust_region: TrustRegion, **options: Any) -> None:
        super().__init__(*ppo, **options)
        self.trust_region = trust_region
        del self.optimizer_factories["policy"]  # the policy takes natural-gradient steps

    def _learn(self, experience: Experience, text: Texts | None, iteration: int, means: WeightedMeans) -> int:
        """One step of the policy on the whole batch, then the critic's minibatches."""
        tokens = experience.mask.sum().clamp(min=1)
        micros = [(micro, weights, micro.mask / tokens) for micro, weights in self._micros(experience)]
        with twice_differentiable():
            self._natural_step(experience, micros, means, iteration)
        steps = 1
        if self.value_loss is not None:
            for index in self._order(len(experience), iteration, 0):
                self._learn_values(self.value_loss, select(experience, index), iteration, means)
                steps += 1
        return steps

    def _natural_step(self, experience: Experience, micros: Micros, means: WeightedMeans, iteration: int) -> None:
        parameters = self.roles.policy_parameters()
        old = [self.roles.distribution(micro.rollout, self.settings.temperature).detached() for micro, *_ in micros]
        before, gradient, mine = 0.0, torch.zeros_like(parameters_to_vector(parameters)), WeightedMeans()
        for micro, weights, _ in micros:
            loss = self.objective.loss(micro, weights, mine)
            before += loss.item()
            gradient += flat(torch.autograd.grad(loss, parameters, materialize_grads=True))
        before, gradient = sum(gather(before)), all_reduce_sum(gradient)
        mine = mine.over_ranks()
        mine.add("policy/grad_norm", gradient.norm())
        if not self._finite("policy", mine, experience, iteration):
            return
        means.merge(mine)
        if self._warming_up(iteration):
            return

        fisher = self._fisher(micros, old)

        def damped(vector: Tensor) -> Tensor:
            return fisher(vector) + self.trust_region.damping * vector

        direction = conjugate_gradient(damped, -gradient, self.trust_region.cg_iterations)
        step = step_length(direction.dot(damped(direction)), self.trust_region.max_kl) * direction
        self._line_search(step, before, lambda: self._measure(micros, old), means)

    def _fisher(self, micros: Micros, old: list[TokenDistribution]) -> Callable[[Tensor], Tensor]:
        """v -> F v: the gradient of (gradient of the mean KL) . v, at the old policy.

        A batch of one micro-batch keeps the graph of that inner gradient from product to product. Of several the graphs
        would take as many times the memory: each is made again for every product.
        """
        parameters, one = self.roles.policy_parameters(), len(micros) == 1

        def slope(place: int) -> Tensor:
            micro, _, shares = micros[place]
            kl = weighted_sum(self._kl(micro, old[place]), shares, micro.mask)
            return flat(torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True))

        slope_of = cache(slope) if one else slope

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            for place in range(len(micros)):
                along = slope_of(place).dot(vector)
                total += flat(torch.autograd.grad(along, parameters, retain_graph=one, materialize_grads=True))
            return all_reduce_sum(total)

        return product

    def _kl(self, micro: Experience, old: TokenDistribution) -> Tensor:
        return old.kl(self.roles.distribution(micro.rollout, self.settings.temperature))

    @torch.no_grad()
    def _measure(self, micros: Micros, old: list[TokenDistribution]) -> tuple[float, float]:
        """Loss and mean exact KL(old || new), nats per token, of the present policy."""
        loss = kl = 0.0
        for (micro, weights, shares), before in zip(micros, old, strict=True):
            loss += self.objective.loss(micro, weights, WeightedMeans()).item()
            kl += weighted_sum(self._kl(micro, before), shares, micro.mask).item()
        losses, kls = zip(*gather((loss, kl)), strict=True)
        return sum(losses), sum(kls)

    @torch.no_grad()
    def _line_search(
        self, step: Tensor, before: float, measure: Callable[[], tuple[float, float]], means: WeightedMeans
    ) -> None:
        """Halve the step until the bound holds and the loss is lower; log the accepted step."""
        parameters = self.roles.policy_parameters()
        start = snapshot(parameters)
        moves = [
            piece.view_as(p) for piece, p in zip(step.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        kl = gain = fraction = 0.0
        for halvings in range(self.trust_region.backtracks):
            factor = 0.5**halvings
            restore([old + factor * move for old, move in zip(start, moves, strict=True)], parameters)
            loss, kl_now = measure()
            if kl_now <= self.trust_region.max_kl and loss < before:
                kl, gain, fraction = kl_now, before - loss, factor
                break
        else:
            restore(start, parameters)
        for name, value in {"step_kl": kl, "step_gain": gain, "step_fraction": fraction}.items():
            means.add(f"policy/{name}", value)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
