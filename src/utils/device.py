"""The device of a command."""

from __future__ import annotations

from pathlib import Path

import psutil
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


def free_memory(on: torch.device) -> int:
    """Bytes that this process can still use on a device; of main memory no more than a container's limit leaves."""
    if on.type == "cuda":
        return torch.cuda.mem_get_info(on)[0]
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no Linux, or no container
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
