"""The coefficient of the KL to the reference, fixed or steered toward a target."""

from __future__ import annotations

from typing import Any, Protocol

from src.errors import require


class KLController(Protocol):
    """Holds the weight of a KL term."""

    kl_coef: float

    def update(self, kl: float, episodes: int) -> None:
        """Update the weight from the mean KL over `episodes` episodes."""

    def state_dict(self) -> dict[str, Any]:
        """State of the next iteration."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class FixedKL:
    """The same coefficient throughout."""

    def __init__(self, kl_coef: float) -> None:
        require(kl_coef >= 0, "kl_coef", kl_coef, "at least 0")
        self.kl_coef = kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""


class SteeredKL(FixedKL):
    """A coefficient that moves toward a target, and so is part of a checkpoint."""

    def __init__(self, kl_coef: float, kl_target: float) -> None:
        super().__init__(kl_coef)
        require(kl_coef > 0, "kl_coef", kl_coef, "greater than 0")
        require(kl_target > 0, "kl_target", kl_target, "greater than 0")
        self.kl_target = kl_target

    def state_dict(self) -> dict[str, Any]:
        """The present coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the coefficient of a checkpoint; keep the initial one when the checkpoint has none."""
        self.kl_coef = state.get("kl_coef", self.kl_coef)


class AdaptiveKL(SteeredKL):
    """beta <- beta (1 + clip(KL / target - 1, +-0.2) episodes / horizon).

    Source: Ziegler et al., section 2.2 (https://arxiv.org/abs/1909.08593). `kl_target` in nats per sequence,
    `kl_horizon` in episodes.
    """

    def __init__(self, kl_coef: float, kl_target: float, kl_horizon: int) -> None:
        super().__init__(kl_coef, kl_target)
        require(kl_horizon > 0, "kl_horizon", kl_horizon, "greater than 0")
        self.kl_horizon = kl_horizon

    def update(self, kl: float, episodes: int) -> None:
        """Move the coefficient after `episodes` sequences with a mean KL of `kl` nats."""
        error = min(max(kl / self.kl_target - 1, -0.2), 0.2)
        self.kl_coef *= max(0.0, 1 + error * episodes / self.kl_horizon)  # drift is never rewarded


class DoublingKL(SteeredKL):
    """beta doubled when the KL is above 1.5 times the target, halved when below the target / 1.5.

    Source: PPO, section 4 (https://arxiv.org/abs/1707.06347), of KL(old || new). `kl_target` in nats per token.
    """

    def update(self, kl: float, episodes: int) -> None:
        """Update once per iteration, from the mean KL of its last epoch, in nats per token."""
        if kl > 1.5 * self.kl_target:
            self.kl_coef *= 2
        elif kl < self.kl_target / 1.5:
            self.kl_coef /= 2
