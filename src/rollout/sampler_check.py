"""Whether an engine draws from the policy that is trained: its logprobs against those of the path that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import ModelError
from src.models.roles import Roles
from src.models.vocab_head import computing_dtype
from src.types import Rollout

LARGEST = {torch.float64: 1e-6, torch.float32: 5e-3}  # nats, of any token
HALF_MEAN = 0.1  # nats, of all tokens: in half precision single tokens differ by far more


def require_agreement(roles: Roles, rollout: Rollout, logprobs: Tensor, temperature: float, fault: str) -> None:
    """Raise `ModelError` if the engine's logprobs differ from `logprobs` (B, T) by more than rounding.

    In float32 and float64 by the largest difference of a token, in half precision (also of autocast and of TF32) by the
    mean. Both grow by 1 / temperature where that is above 1, and so do the limits. Draws no random number. The message
    ends in `fault`.
    """
    mask = rollout.response_mask
    with roles.acting("policy") as lm:
        dtype, kind = computing_dtype(lm.get_output_embeddings().weight), type(lm).__name__
    rough = dtype == torch.float32 and mask.is_cuda and torch.get_float32_matmul_precision() != "highest"
    exact = dtype in LARGEST and not rough
    apart = (rollout.behavior_logprobs - logprobs)[mask].abs().double() * min(1.0, temperature)
    found, limit = (apart.max(), LARGEST[dtype]) if exact else (apart.mean(), HALF_MEAN)
    if not found <= limit:  # also NaN
        by, precision = "at most" if exact else "on average", "TF32" if rough else str(dtype).removeprefix("torch.")
        raise ModelError(
            f"iteration {rollout.policy_version + 1}: the log-probabilities of a {kind} differ by {found:.2g} nats "
            f"{by} between sampling and training ({limit:g} nats {by} are allowed in {precision}): {fault}"
        )
