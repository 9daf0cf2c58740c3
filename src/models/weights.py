"""Snapshot and restore parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from src.utils.distributed import sharded_like


def snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of the present parameters."""
    return [parameter.detach().clone() for parameter in parameters]


def restore(source: Sequence[Tensor], target: Sequence[nn.Parameter]) -> None:
    """Copy tensors into parameters, in place; call it under `torch.no_grad()`."""
    for new, parameter in zip(source, target, strict=True):
        parameter.copy_(sharded_like(new, parameter))


def moved_by(parameters: Sequence[nn.Parameter], size: float, draws: torch.Generator) -> None:
    """Add normal noise of this standard deviation (a generator of the CPU), in place; under `torch.no_grad()`."""
    for parameter in parameters:
        parameter += size * torch.randn(parameter.shape, generator=draws).to(parameter)
