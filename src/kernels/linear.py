"""The matrix products of a linear layer and its adapter, by the faster of PyTorch's two libraries for them."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # number of rows of x that the layout is chosen for; it suits other numbers too


class _OwnProduct(torch.autograd.Function):
    """x W^T + b by `_product`, with first and second derivatives by `linear`."""

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


class _LowRank(torch.autograd.Function):
    """Scales the R numbers per row between the two matrices, not the N after them."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        inner = linear(x, a) * scaling
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, inner if ctx.needs_input_grad[3] else None, a, b)
        ctx.scaling = scaling
        return linear(inner, b).add_(base)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        of_inner = linear(above, b.t()) * ctx.scaling
        of_x = linear(of_inner, a.t()) if ctx.needs_input_grad[1] else None
        of_a = linear(_columns(of_inner), _columns(x)) if ctx.needs_input_grad[2] else None
        of_b = linear(_columns(inner), _columns(above)).t() if ctx.needs_input_grad[3] else None
        return above, of_x, of_a, of_b, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x W^T + b. Shapes: (..., K), (N, K), (N,) -> (..., N). `packed`: `prepacked(weight)`.

    On a CPU in float32 by oneDNN where `onednn_is_faster`; in bfloat16 in float32 and then rounded, unless
    `bfloat16_is_native`. The result is the same up to rounding. Elsewhere `torch.nn.functional.linear`. It can be
    differentiated any number of times.
    """
    if torch.is_autocast_enabled("cpu"):
        narrow = torch.get_autocast_dtype("cpu")
        if narrow == torch.bfloat16 and not bfloat16_is_native():
            weight, bias = weight.to(narrow), None if bias is None else bias.to(narrow)
        if weight.dtype == narrow:
            x = x.to(narrow)
    if packed is None and not _has_own_product(x, weight):
        return F.linear(x.contiguous(), weight, bias)  # for a slice of a batch it would copy the weight for every row
    if not torch.is_grad_enabled():
        return _product(x, weight if packed is None else packed, bias)
    # of rows: the operator's result for more dimensions is a view, and a Function's view cannot be changed in place
    rows: Tensor = _OwnProduct.apply(x.flatten(0, -2), weight, bias, packed)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], -1)


def low_rank(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """base + B u with u = s A x.

        d / dbase = g,   d / dx = A^T h,   d / dA = h x^T,   d / dB = g u^T,   h = s B^T g for the result's gradient g

    Source: "LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685). Shapes: (..., N),
    (..., K), (R, K), (N, R) -> (..., N), all of one precision. The gradients cannot be differentiated again: that
    raises `RuntimeError`.
    """
    rows: Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
        base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, scaling
    )
    return rows.view(base.shape)


def prepacked(weight: Tensor) -> Tensor | None:
    """A copy of a weight (N, K) in oneDNN's layout; None if its product does not use oneDNN.

    Without it every product converts the weight to that layout. On a CPU for a dtype that is multiplied
    `by_onednn`, unless autocast computes in another dtype than the weight's.
    """
    computed_in = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if weight.device.type != "cpu" or computed_in != weight.dtype or not by_onednn(weight.dtype):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether products of matrices of that dtype on a CPU are oneDNN's: bfloat16 and float32, where it is fast."""
    fast = {torch.bfloat16: bfloat16_is_native, torch.float32: onednn_is_faster}
    return _has_onednn() and dtype in fast and fast[dtype]()


@cache
def bfloat16_is_native() -> bool:
    """Whether the processor multiplies matrices of bfloat16.

    Without AVX-512 or its like oneDNN has no product of them, and that of PyTorch is 10 to 100 times slower than in
    float32.
    """
    return _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than PyTorch's own choice, which is MKL.

    MKL makes no use of AVX-512 on AMD's processors and takes twice as long there; on Intel's, and on AMD's without
    AVX-512, it takes 0.8 to 1.0 times as long. A rule and no measurement: the two round differently, and a
    resumed run has to give the same bits.
    """
    return _is_amd() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (info.read_text(encoding="utf-8") if info.is_file() else platform.processor())


def few_sizes(count: int) -> int:
    """The next of 32 sizes between a power of two and its double: at most a 32nd more than `count`.

    oneDNN compiles a kernel for each size of a matrix, which takes milliseconds and half a megabyte.
    """
    step = max(1, 2 ** (count.bit_length() - 1) // 32) if count else 1
    return -(-count // step) * step


def _columns(x: Tensor) -> Tensor:
    """(..., N) as (N, rows)."""
    return x.reshape(-1, x.shape[-1]).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dtype == torch.bfloat16 and not bfloat16_is_native():
        with torch.autocast("cpu", enabled=False):
            return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _has_own_product(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.numel() == 0 or x.dim() == 1:
        return False
    if x.dtype == torch.bfloat16:
        return not bfloat16_is_native() and type(x) is Tensor  # not a fake tensor that stands for a GPU
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and by_onednn(x.dtype)


def _has_onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
