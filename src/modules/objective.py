"""What the policy and the critic descend: the loss of each token, all its terms in one place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from src.core.aggregation import weighted_sum
from src.core.kl import ExactKL, KLEstimator
from src.core.policy_losses import TokenLoss, probability_ratio
from src.models.distribution import TokenDistribution
from src.models.roles import Roles
from src.models.weights import snapshot
from src.modules.weighted_means import WeightedMeans
from src.rollout.kl_controller import KLController
from src.types import Experience

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
ValueLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class PolicyObjective:
    """L_t = policy loss_t + old_kl_coef KL_t(old || new) + kl_coef KL_t(new || reference) - entropy_coef H_t.

    `old_kl_controller` holds old_kl_coef (0 but for the penalty form of PPO); kl_coef comes with the experience.
    """

    def __init__(
        self,
        roles: Roles,
        policy_loss: PolicyLoss,
        old_kl: KLEstimator,
        old_kl_controller: KLController,
        reference_kl: KLEstimator | None,
        entropy_coef: float,
        temperature: float,
    ) -> None:
        self.roles, self.policy_loss, self.entropy_coef, self.temperature = (
            roles,
            policy_loss,
            entropy_coef,
            temperature,
        )
        self.old_kl, self.old_kl_controller, self.reference_kl = old_kl, old_kl_controller, reference_kl
        self._old_policy: list[Tensor] = []

    def remember_old_policy(self) -> None:
        """The policy as it now stands is what the next updates are compared with."""
        if isinstance(self.old_kl, ExactKL):
            self._old_policy = snapshot(self.roles.policy_parameters())

    def loss(self, micro: Experience, weights: Tensor, means: WeightedMeans) -> Tensor:
        """sum_t w_t L_t over a micro-batch, a scalar; what was seen on the way goes to `means`."""
        old = self._old_distribution(micro)
        policy = self.roles.distribution(micro.rollout, self.temperature)
        logprobs, entropy = policy.logprobs_and_entropy(entropy_trains=self.entropy_coef > 0)
        loss, indicators = self.policy_loss(logprobs, micro.old_logprobs, micro.advantages, micro.mask)
        old_kl = self.old_kl(micro.old_logprobs, logprobs, lambda: old.kl(policy))
        seen = {"loss": loss, "entropy": entropy, "old_kl": old_kl}
        total = loss - self.entropy_coef * entropy
        if self.old_kl_controller.kl_coef > 0:
            total = total + self.old_kl_controller.kl_coef * old_kl
        if micro.loss_kl_coef > 0:
            seen["reference_kl"] = self._kl_to_reference(policy, logprobs, micro)
            total = total + micro.loss_kl_coef * seen["reference_kl"]
        ratio = probability_ratio(logprobs.detach(), micro.old_logprobs, micro.mask)
        for name, values in (seen | {"ratio": ratio} | indicators).items():
            means.add_tokens(f"policy/{name}", values, micro.mask)
        return weighted_sum(total, weights, micro.mask)

    def _old_distribution(self, micro: Experience) -> TokenDistribution | None:
        """pi_old, before the new policy's pass, because looking back moves the weights; None when only sampled."""
        if not self._old_policy:
            return None
        return self.roles.old_distribution(micro.rollout, self.temperature, self._old_policy)

    def _kl_to_reference(self, policy: TokenDistribution, logprobs: Tensor, micro: Experience) -> Tensor:
        assert self.reference_kl is not None
        assert micro.ref_logprobs is not None

        def exact() -> Tensor:
            with torch.no_grad():
                reference = self.roles.distribution(micro.rollout, self.temperature, "reference")
            return policy.kl(reference)

        return self.reference_kl(logprobs, micro.ref_logprobs, exact)


def critic_objective(
    roles: Roles, value_loss: ValueLoss, micro: Experience, weights: Tensor, means: WeightedMeans
) -> Tensor:
    """sum_t w_t L_t of the critic over a micro-batch, a scalar; what was seen on the way goes to `means`."""
    assert micro.old_values is not None
    assert micro.returns is not None
    losses, clipped = value_loss(roles.values(micro.rollout), micro.old_values, micro.returns, micro.mask)
    means.add_tokens("critic/loss", losses, micro.mask)
    means.add_tokens("critic/clip_fraction", clipped, micro.mask)
    return weighted_sum(losses, weights, micro.mask)
