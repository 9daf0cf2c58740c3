"""The losses of policy and critic per token, with all their terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from src.core.aggregation import weighted_sum
from src.core.kl import ExactKL, KLEstimator
from src.core.policy_losses import TokenLoss, probability_ratio
from src.models.distribution import TokenDistribution
from src.models.forward import next_token_logprobs
from src.models.roles import Roles
from src.models.weights import snapshot
from src.modules.weighted_means import WeightedMeans
from src.rollout.kl_controller import KLController
from src.types import Experience
from src.utils.distributed import per_rank_size, round_robin

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
ValueLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Texts = dict[str, Tensor]  # ids and mask of the language-model loss


class PolicyObjective:
    """L_t = w_t policy loss_t + old_kl_coef KL_t(old || new) + kl_coef KL_t(new || reference) - entropy_coef H_t.

    `old_kl_controller` holds old_kl_coef (0 except in the penalty form of PPO); kl_coef and w_t, the
    correction for another policy that sampled (else 1), are part of the experience.
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
        """Keep the present policy as pi_old of the next updates."""
        if isinstance(self.old_kl, ExactKL):
            self._old_policy = snapshot(self.roles.policy_parameters())

    def loss(self, micro: Experience, weights: Tensor, means: WeightedMeans) -> Tensor:
        """sum_t w_t L_t over a micro-batch, a scalar; metrics are added to `means`."""
        old = self._old_distribution(micro)
        policy = self.roles.distribution(micro.rollout, self.temperature)
        logprobs, entropy = policy.logprobs_and_entropy(entropy_trains=self.entropy_coef > 0)
        loss, indicators = self.policy_loss(logprobs, micro.old_logprobs, micro.advantages, micro.mask)
        if micro.correction is not None:
            loss = micro.correction * loss
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
        """pi_old, computed before the new policy's pass, as it swaps the weights; None unless the KL is exact."""
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
    """sum_t w_t L_t of the critic over a micro-batch, a scalar; metrics are added to `means`."""
    assert micro.old_values is not None
    assert micro.returns is not None
    losses, clipped = value_loss(roles.values(micro.rollout), micro.old_values, micro.returns, micro.mask)
    means.add_tokens("critic/loss", losses, micro.mask)
    means.add_tokens("critic/clip_fraction", clipped, micro.mask)
    return weighted_sum(losses, weights, micro.mask)


def text_objective(
    roles: Roles, text: Texts, micro_batch_size: int, fitting: int, means: WeightedMeans
) -> Iterator[Tensor]:
    """-1/N sum log p(x_t | x_<t) over the N tokens of the texts (InstructGPT's PPO-ptx), in pieces that add up to it.

    The pieces are this rank's: `micro_batch_size` texts each, or as many as fit into memory. Every rank makes equally
    many passes; one that has no texts left for the last reads the first again and counts nothing.
    """
    tokens, texts = int((text["mask"][:, 1:] & text["mask"][:, :-1]).sum()), len(text["ids"])
    own = round_robin(torch.arange(texts).split(per_rank_size(texts, micro_batch_size)))
    for rows in (piece for micro in own for piece in (micro.split(fitting) if micro is not None else [None])):
        ids, mask = (text[name][:1] if rows is None else text[name][rows] for name in ("ids", "mask"))
        with roles.acting("policy") as lm:
            logprobs = next_token_logprobs(lm, ids, mask, checkpointing=roles.checkpointing)
        if rows is None:
            yield 0 * logprobs.sum()
            continue
        yield -logprobs.sum() / max(tokens, 1)
        means.add("policy/lm_loss", -logprobs.detach().sum() / max(len(logprobs), 1), len(logprobs))
