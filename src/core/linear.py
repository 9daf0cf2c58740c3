"""The matrix product of a linear layer, by the faster of PyTorch's two libraries for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of x that the order is chosen for; it suits fewer and more as well


class _OneDNN(torch.autograd.Function):
    """x W^T + b by oneDNN; so are its gradients, and theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight if packed is None else packed, bias)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = linear(above, weight.t()) if ctx.needs_input_grad[0] else None
        rows = above.flatten(0, -2)
        of_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x W^T + b. Shapes: (..., K), (N, K), (N,) -> (..., N). `packed`: what `prepacked` made of this very weight.

    In float32 on a CPU by oneDNN; PyTorch itself would take MKL, at half the speed on CPUs that are not Intel's. Up
    to rounding the same; PyTorch's compiler calls the same operator. Elsewhere, and in a build without that operator,
    `torch.nn.functional.linear`. May be differentiated as often as one likes.
    """
    if packed is not None and torch.is_autocast_enabled("cpu"):
        x = x.to(weight.dtype)
    if packed is None and not _float32_on_cpu(x, weight):
        return F.linear(x.contiguous(), weight, bias)  # of a slice of a batch it would copy the weight for every row
    if not torch.is_grad_enabled():
        return _product(x, weight if packed is None else packed, bias)
    result: Tensor = _OneDNN.apply(x, weight, bias, packed)  # type: ignore[no-untyped-call]
    return result


def prepacked(weight: Tensor) -> Tensor | None:
    """A copy of a weight (N, K) in the order that oneDNN reads it in; None where its product is not oneDNN's.

    Without it every product puts the weight into that order anew. In float32 and bfloat16 on a CPU, unless autocast
    computes in another precision than the weight's.
    """
    computed_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    plain = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if not plain or computed_in != weight.dtype or not _has_onednn():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and x.dim() > 1
    return plain and not torch.is_autocast_enabled("cpu") and _has_onednn()


def _has_onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
