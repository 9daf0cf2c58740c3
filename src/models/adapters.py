"""LoRA adapters of peft, made from the settings of a model."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.errors import ModelError
from src.kernels.fast_layers import Linear
from src.models.quantized_linear import QuantizedLinear
from src.models.settings import LoraSettings

NAMES = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
)  # of which the order means nothing


def lora_config(lora: LoraSettings, base: PreTrainedModel) -> LoraConfig:
    """The settings as peft's config. Raises `ModelError` when the base has fewer layers than they name."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    layers = base.config.get_text_config().num_hidden_layers
    if lora.layers is not None and targets == "all-linear":  # peft takes a list of layers with a list of names only
        targets = linear_names(base.base_model)
    for key in ("layers", "critic_layers"):
        if (getattr(lora, key) or 0) > layers:
            raise ModelError(f"model.lora.{key}={getattr(lora, key)}: the model has {layers} layers")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=not_adaptable(base) or None if targets == "all-linear" else None,
        layers_to_transform=None if lora.layers is None else list(range(layers - lora.layers, layers)),
        task_type="CAUSAL_LM",
    )


def not_adaptable(model: nn.Module) -> list[str]:
    """The names of linear layers on which an adapter would fail or not act.

    Those are linear layers with a forward of their own (routers that return more than a product), the projections of
    Mamba's layers whose weights are read by the scan itself, and the towers of a model for pictures or sound.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    text, backbone = set(decoder.modules()), set(getattr(model, "base_model", model).modules())
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) not in (nn.Linear, Linear, QuantizedLinear):
            output = module(module.weight.new_zeros(1, module.in_features))
            found += [] if isinstance(output, Tensor) else [name]
        if hasattr(module, "conv1d") and hasattr(module, "D"):
            found += [f"{name}.{part}" for part in ("out_proj", "dt_proj") if hasattr(module, part)]
        if isinstance(module, nn.Linear | Conv1D) and module in backbone and module not in text:
            found.append(name)
    return found


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers; a layer with adapters counts once."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | BaseTunerLayer))
    return sorted({name.rpartition(".")[2] for name in linear if not name.startswith(inside)})


def places(peft: PeftModel, name: str) -> list[tuple[nn.Module, str]]:
    """Where the tensors of the adapter `name` are: module and attribute."""
    names = [key.rpartition(".") for key, _ in peft.named_parameters() if f".{name}." in key]
    return [(peft.get_submodule(module), attribute) for module, _, attribute in names]


def sort_targets(folder: Path) -> None:
    """Sort the lists of names in `adapter_config.json`: peft writes sets, in an order that Python draws each time."""
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    lists = {key: sorted(value) for key, value in content.items() if key in NAMES and isinstance(value, list)}
    file.write_text(json.dumps(content | lists, indent=2, sort_keys=True), encoding="utf-8")


def add_adapter(base: PreTrainedModel, lora: LoraSettings, name: str) -> PeftModel:
    """Freeze `base` and add a new adapter. Raises `ModelError` when a target matches no layer."""
    base.requires_grad_(False)
    try:
        peft = get_peft_model(base, lora_config(lora, base), adapter_name=name)
    except ValueError as error:
        raise ModelError(f"model.lora.targets={lora.targets!r} does not fit {base.name_or_path!r}: {error}") from error
    fast = getattr(base.base_model, "fast_pass", None)
    if fast is not None:
        fast.adapt(peft)
    return peft
