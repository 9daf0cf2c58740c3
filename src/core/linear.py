"""The matrix product of a linear layer, by the faster of PyTorch's two libraries for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _OneDNN(torch.autograd.Function):
    """x W^T + b by oneDNN; so are its gradients, and theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = linear(above, weight.t()) if ctx.needs_input_grad[0] else None
        rows = above.flatten(0, -2)
        of_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. Shapes: (..., K), (N, K), (N,) -> (..., N).

    In float32 on a CPU by oneDNN; PyTorch itself would take MKL, at half the speed on CPUs that are not Intel's. Up
    to rounding the same; PyTorch's compiler calls the same operator. Elsewhere, and in a build without that operator,
    `torch.nn.functional.linear`. May be differentiated as often as one likes.
    """
    if not _float32_on_cpu(x, weight):
        return F.linear(x.contiguous(), weight, bias)  # of a slice of a batch it would copy the weight for every row
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    result: Tensor = _OneDNN.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and x.dim() > 1
    return (
        plain
        and not torch.is_autocast_enabled("cpu")
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
