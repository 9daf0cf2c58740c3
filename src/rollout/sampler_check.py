"""Whether an engine draws from the policy that is trained: its logprobs against those of the path that trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import ModelError
from src.models.roles import Roles
from src.models.vocab_head import computing_dtype
from src.types import Rollout

LARGEST = {torch.float64: 1e-6, torch.float32: 5e-3}  # nats, of any token
HALF_MEAN = 0.1  # nats, of all tokens: in half precision single tokens differ by far more


@dataclass(frozen=True)
class Agreement:
    """How far two computations of the same log-probabilities are apart, and how far rounding may bring them."""

    found: float  # nats
    limit: float  # nats
    by: str  # "at most" over the tokens, or "on average"
    precision: str
    kind: str  # the model's class

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference; False for NaN."""
        return self.found <= self.limit

    def __str__(self) -> str:
        return f"{self.found:.2g} nats {self.by} ({self.precision} may: {self.limit:g})"


def agreement(roles: Roles, mask: Tensor, one: Tensor, other: Tensor, temperature: float) -> Agreement:
    """The difference of two tensors (B, T) of log-probabilities where the mask (B, T) counts. Draws no random number.

    In float32 and float64 the largest difference of a token, in half precision (also of autocast and of TF32) the mean.
    Both grow by 1 / temperature where that is above 1, and so do the limits.
    """
    with roles.acting("policy") as lm:
        dtype, kind = computing_dtype(lm.get_output_embeddings().weight), type(lm).__name__
    rough = dtype == torch.float32 and mask.is_cuda and torch.get_float32_matmul_precision() != "highest"
    exact = dtype in LARGEST and not rough
    apart = (one - other)[mask].abs().double() * min(1.0, temperature)
    found, limit = (apart.max(), LARGEST[dtype]) if exact else (apart.mean(), HALF_MEAN)
    precision = "TF32" if rough else str(dtype).removeprefix("torch.")
    return Agreement(found.item(), limit, "at most" if exact else "on average", precision, kind)


def require_agreement(roles: Roles, rollout: Rollout, logprobs: Tensor, temperature: float, fault: str) -> None:
    """Raise `ModelError` if the engine's logprobs differ from `logprobs` (B, T) by more than rounding.

    The message ends in `fault`.
    """
    found = agreement(roles, rollout.response_mask, rollout.behavior_logprobs, logprobs, temperature)
    if not found.holds:
        raise ModelError(
            f"iteration {rollout.policy_version + 1}: the log-probabilities of a {found.kind} differ by "
            f"{found.found:.2g} nats {found.by} between sampling and training ({found.limit:g} nats {found.by} are "
            f"allowed in {found.precision}): {fault}"
        )
