"""The device of a command."""

from __future__ import annotations

import torch

from src.errors import ConfigError


def device() -> torch.device:
    """CUDA if available, else the CPU.

    Never an Apple GPU: it has no float64, in which tokens are drawn and running moments are summed.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def accelerator(given: object) -> object:
    """The value of `trainer.accelerator` for Lightning; `auto` is `device`. Raises `ConfigError` for an Apple GPU."""
    apple = given == "gpu" and torch.backends.mps.is_available() and not torch.cuda.is_available()
    if given == "mps" or apple:
        raise ConfigError(
            f"trainer.accelerator={given}: Apple's GPUs have no float64, in which tokens are drawn; use "
            f"trainer.accelerator=cpu"
        )
    return device().type if given == "auto" else given
