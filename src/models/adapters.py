"""LoRA adapters by peft, from the settings of a model."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.models.loading import ModelError
from src.models.settings import LoraSettings


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
        return get_peft_model(base, lora_config(lora, base), adapter_name=name)
    except ValueError as error:
        raise ModelError(f"model.lora.targets={lora.targets!r} does not fit {base.name_or_path!r}: {error}") from error
