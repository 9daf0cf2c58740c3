"""A base in 4 or 8 bits: quantizing it once it is loaded, and models of plain weights made from it and an adapter."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.errors import ModelError
from src.kernels.fast_layers import Linear, TransposedLinear
from src.models.adapters import not_adaptable
from src.models.quantized_linear import QuantizedLinear, require_bitsandbytes

PLAIN = (nn.Linear, Conv1D, Linear, TransposedLinear)  # exactly: others compute their products otherwise


def quantize(lm: PreTrainedModel, how: str | None) -> PreTrainedModel:
    """The same model, the linear layers of its backbone replaced by `QuantizedLinear` (`how`: "nf4", "int8").

    Embeddings, norms, heads, fused experts and the layers on which no adapter acts stay as they are. None changes
    nothing. Raises `ModelError` when there is no such layer, or no bitsandbytes.
    """
    if how is None:
        return lm
    require_bitsandbytes()
    kept, backbone = set(not_adaptable(lm)), set(lm.base_model.modules())
    names = [n for n, module in lm.named_modules() if type(module) in PLAIN and module in backbone and n not in kept]
    del backbone  # which would keep every weight until the last one is quantized
    if not names:
        raise ModelError(f"model.quantize={how}: {type(lm).__name__} has no plain linear layers: model.quantize=null")
    for name in names:
        _replace(lm, name, QuantizedLinear(lm.get_submodule(name), how))
    for parameter in lm.parameters():  # one that is a view into the file's mapping would keep all of it in memory
        parameter.data = parameter.data.clone()
    return lm


def quantized_as(model: nn.Module) -> str | None:
    """How the base of a model is held, "nf4" or "int8"; None for plain weights."""
    return next((layer.how for layer in model.modules() if isinstance(layer, QuantizedLinear)), None)


def merged(peft: PeftModel, adapter: str | None = None) -> PreTrainedModel:
    """The model with W + (alpha / rank) B A instead of each adapted W; changes `peft` (None: its active adapter).

    A W of few bits is the one that was trained on, dequantized. To quantize the sum again, as peft does with layers of
    bitsandbytes, would round most of the update away.
    """
    base, name = peft.get_base_model(), adapter or peft.active_adapter
    for place, layer in [(n, m) for n, m in base.named_modules() if isinstance(m, QuantizedLinear)]:
        outer = base.get_submodule(place.removesuffix(".base_layer"))  # its adapters, if it has any
        adapted = outer is not layer and name in outer.lora_A
        update = outer.get_delta_weight(name) if adapted else None
        _replace(base, place.removesuffix(".base_layer"), layer.plain(base.dtype, update))
    return peft.merge_and_unload(adapter_names=[name])


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
