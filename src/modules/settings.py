"""The numbers of PPO's updates, checked when they are set."""

from __future__ import annotations

from dataclasses import dataclass

from src.errors import require


@dataclass(frozen=True)
class PPOSettings:
    """Settings of the updates on one batch of experience."""

    batch_size: int = 64
    epochs: int = 4
    minibatch_size: int = 32
    micro_batch_size: int = 32
    max_grad_norm: float = 1.0
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    early_stop_kl: float | None = None
    critic_warmup: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together and coefficients of the wrong sign."""
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        allowed = f"between 1 and ppo.batch_size ({self.batch_size})"
        require(1 <= self.minibatch_size <= self.batch_size, "minibatch_size", self.minibatch_size, allowed)
        require(self.micro_batch_size >= 1, "micro_batch_size", self.micro_batch_size, "at least 1")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "greater than 0")
        for name in ("entropy_coef", "ptx_coef", "critic_warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        limit = self.early_stop_kl
        require(limit is None or limit > 0, "early_stop_kl", limit, "greater than 0 nats per token, or null")
