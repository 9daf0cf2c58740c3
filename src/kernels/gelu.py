"""GPT-2's activation and its derivative in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
IN_CACHE = 2**16  # elements computed at a time: intermediate results stay in a core's cache


class _GELU(torch.autograd.Function):
    """Keeps f'(x) instead of x for the backward pass, which is then one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = x.reshape(-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        linear = x.new_full((), LINEAR, dtype=wide)
        blocks = range(0, x.numel(), IN_CACHE)
        for start in blocks if type(x) is Tensor else blocks[:1]:  # a fake tensor has no numbers, only memory
            part = slice(start, start + IN_CACHE)
            a = flat[part].to(wide)
            p = torch.addcmul(linear, a, a, value=CUBIC).mul_(a).sigmoid_()
            if slope is not None:
                inner = torch.addcmul(linear, a, a, value=3 * CUBIC).mul_(a)  # x u'(x)
                slope.view(-1)[part] = torch.ops.aten.sigmoid_backward(inner, p).add_(p)
            y.view(-1)[part] = p.mul_(a)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        of_x: Tensor = above * slope
        return of_x


def gelu_tanh(x: Tensor) -> Tensor:
    """f(x) = x / 2 (1 + tanh(u / 2)) = x p, p = sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3), of any shape.

        f'(x) = p + x u'(x) p (1 - p)

    Source: "Gaussian Error Linear Units" (https://arxiv.org/abs/1606.08415), in GPT-2's form. PyTorch's, which is
    used elsewhere, needs a tanh in each direction; on a CPU either one costs as much as all of this. The gradient
    cannot be differentiated again: that raises `RuntimeError`.
    """
    if x.device.type != "cpu":
        return gelu(x, approximate="tanh")
    result: Tensor = _GELU.apply(x)  # type: ignore[no-untyped-call]
    return result
