"""LoRA adapters by peft, from the settings of a model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.errors import ModelError
from src.kernels.double_backward import is_twice_differentiable
from src.kernels.linear import low_rank
from src.models.settings import LoraSettings


class AdaptedLinear(peft_lora.Linear):
    """peft's layer, which adds one plain adapter in fewer passes over memory."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + s B A x, (..., K) -> (..., N)."""
        name = None if args or kwargs or is_twice_differentiable() else self._only_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Tensor = self.base_layer(x)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank(base, x.to(base.dtype), a.to(base.dtype), b.to(base.dtype), self.scaling[name])

    def _only_adapter(self, x: Tensor) -> str | None:
        """The one to be added, if there is just one, of the plain sort, without dropout and in the precision of `x`."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        behind, dropout = self.lora_B[active[0]], self.lora_dropout[active[0]]
        plain = behind.bias is None and (isinstance(dropout, nn.Identity) or not self.training)
        alike = torch.is_autocast_enabled(x.device.type) or behind.weight.dtype == x.dtype
        return active[0] if plain and alike else None


def lora_config(lora: LoraSettings, base: PreTrainedModel) -> LoraConfig:
    """The settings in peft's terms. Raises `ModelError` when the base has fewer layers than are to be adapted."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    layers = base.config.num_hidden_layers
    if lora.layers is not None and targets == "all-linear":  # peft takes a list of layers with a list of names only
        targets = linear_names(base.base_model)
    if lora.layers is not None and lora.layers > layers:
        raise ModelError(f"model.lora.layers={lora.layers}: the model has {layers} layers")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=None if lora.layers is None else list(range(layers - lora.layers, layers)),
        task_type="CAUSAL_LM",
    )


def linear_names(model: nn.Module) -> list[str]:
    """What a model calls its linear layers, without the path to them; one that holds adapters is still one layer."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | BaseTunerLayer))
    return sorted({name.rpartition(".")[2] for name in linear if not name.startswith(inside)})


def add_adapter(base: PreTrainedModel, lora: LoraSettings, name: str) -> PeftModel:
    """Freeze `base` and put a fresh adapter on it. Raises `ModelError` when a target matches no layer."""
    base.requires_grad_(False)
    try:
        peft = get_peft_model(base, lora_config(lora, base), adapter_name=name)
    except ValueError as error:
        raise ModelError(f"model.lora.targets={lora.targets!r} does not fit {base.name_or_path!r}: {error}") from error
    for module in peft.modules():
        if type(module) is peft_lora.Linear:
            module.__class__ = AdaptedLinear
    return peft
