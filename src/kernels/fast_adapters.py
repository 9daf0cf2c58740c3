"""peft's layer with one plain LoRA adapter, in fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from src.kernels.linear import low_rank
from src.utils.double_backward import is_twice_differentiable


class AdaptedLinear(peft_lora.Linear):
    """peft's layer, with a fused product for a single plain adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + s B A x, (..., K) -> (..., N)."""
        name = None if args or kwargs or is_twice_differentiable() else self._only_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Tensor = self.base_layer(x)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank(base, x.to(base.dtype), a.to(base.dtype), b.to(base.dtype), self.scaling[name])

    def _only_adapter(self, x: Tensor) -> str | None:
        """The active adapter if there is exactly one, plain, without dropout; else None.

        Its weights may be wider than `x`: on a base in half precision peft would compute the adapter in float32, which
        takes four times as long.
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        weight, dropout = self.lora_B[active[0]].weight, self.lora_dropout[active[0]]
        plain = self.lora_B[active[0]].bias is None and (isinstance(dropout, nn.Identity) or not self.training)
        fits = torch.promote_types(weight.dtype, x.dtype) == weight.dtype or torch.is_autocast_enabled(x.device.type)
        return active[0] if plain and fits else None


def adapt(model: nn.Module) -> None:
    """Change the class of a model's adapted layers to `AdaptedLinear`; their weights are unchanged."""
    for module in model.modules():
        if type(module) is peft_lora.Linear:
            module.__class__ = AdaptedLinear
