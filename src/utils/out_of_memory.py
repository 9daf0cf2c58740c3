"""Whether memory ran out."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.memory import is_oom_error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a device or of the machine is full."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)
