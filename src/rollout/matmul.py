"""Linear layers by oneDNN where PyTorch would take MKL, which is at half its speed on CPUs that are not Intel's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def onednn_linear(lm: torch.nn.Module) -> AbstractContextManager[Any]:
    """x W^T + b by oneDNN in float32 on a CPU, for passes without gradient: the same numbers up to rounding.

    PyTorch's compiler calls the same operator. Elsewhere (a GPU, another dtype) nothing is changed.
    """
    first = next(lm.parameters())
    here = first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return _OneDNN() if here and hasattr(torch.ops.mkldnn, "_linear_pointwise") else nullcontext()


class _OneDNN(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs and not torch.is_grad_enabled():
            if func is F.linear and _plain(*args):
                return _linear(*args)
            if func is torch.addmm and _plain(*args) and args[0].dim() == 1:  # GPT-2's layers: b, x, W^T
                return _linear(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _plain(*tensors: Tensor | None) -> bool:
    return all(x is None or (x.dtype == torch.float32 and x.device.type == "cpu" and x.numel()) for x in tensors)
