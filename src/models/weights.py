"""Numbers of parameters, put aside and put back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of parameters as they now are."""
    return [parameter.detach().clone() for parameter in parameters]


def restore(source: Sequence[Tensor], target: Sequence[nn.Parameter]) -> None:
    """Copy numbers into parameters, in place; to be called without gradient."""
    for new, parameter in zip(source, target, strict=True):
        parameter.copy_(new)
