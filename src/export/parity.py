"""Whether two model folders give the same outputs, and how much of an adapter its merged weights hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from src.core.kl import categorical_kl
from src.models.accounting import load_whole
from src.models.adapter_folders import adapter_base, load_whole_adapter
from src.models.loading import load_config
from src.models.quantized_linear import QuantizedLinear
from src.utils.seeding import generator


@dataclass(frozen=True)
class Comparison:
    """The distance of two models on a probe."""

    difference: float  # of language models the mean KL(original || exported) in nats, of scores the largest difference
    same_top: float  # share of the probe's places with the same most probable token; 1 for scores
    lost: float | None  # |error| / |update| of the merged weights; None without base and adapter
    dtype: torch.dtype  # of the original
    original: str  # what the exported model was compared with, in words


def compare(source: Path, exported: Path, base: str | None, scores: bool, trusted: bool = False) -> Comparison:
    """The exported folder against the model that a run saved in `source`: base and adapter where both are at hand.

    The probe is two sequences of 16 random tokens. `scores`: compare the scores of reward models. `trusted`: code in
    the folders may be run.
    """
    copied = _load(str(exported), scores, trusted)
    ids = torch.randint(copied.config.get_text_config().vocab_size, (2, 16), generator=generator(0, "probe"))
    known = base_at_hand(source, base)
    if known is not None:
        original: nn.Module = base_and_adapter(source, known, scores, trusted)
        name = "base and adapter"
    else:
        original, name = _load(str(source / "model"), scores, trusted), "the run's model"
    dtype = next(original.parameters()).dtype
    ours, theirs = (_outputs(model, ids, scores) for model in (copied, original))
    lost = lost_of_update(original, copied) if isinstance(original, PeftModel) and not scores else None
    if scores:
        return Comparison((ours - theirs).abs().max().item(), 1.0, lost, dtype, name)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    return Comparison(categorical_kl(theirs, ours).mean().item(), same, lost, dtype, name)


def base_at_hand(source: Path, base: str | None) -> str | None:
    """The folder of the base below a run's adapter, if both are there."""
    adapter = source / "adapter"
    known = adapter_base(str(adapter)) if adapter.is_dir() else None
    return known if known is not None and base is not None and (Path(known) / "config.json").is_file() else None


def base_and_adapter(source: Path, base: str, scores: bool, trusted: bool) -> PeftModel:
    """The base with the run's adapter, not merged, as trained: in the dtype in which the run saved it."""
    trained = load_config(str(source / "model"), trusted=trusted).dtype
    wanted = trained if isinstance(trained, torch.dtype) else torch.float32
    return load_whole_adapter(_load(base, scores, trusted, wanted), str(source / "adapter"), "export").eval()


@torch.no_grad()
def lost_of_update(adapted: PeftModel, merged: nn.Module) -> float:
    """|W' - (W + U)| / |U| over all adapted weights W with their update U = (alpha / rank) B A and merged weight W'.

    Rounding W + U to half precision loses an update that is small against W.
    """
    error = update = 0.0
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            change = layer.get_delta_weight(layer.active_adapters[0]).double()
            which = getattr(layer, "parameter_name", "weight")  # the matrices of fused experts have other names
            base, new = layer.get_base_layer(), merged.get_parameter(f"{name.replace('.base_layer', '')}.{which}").data
            few_bits = isinstance(base, QuantizedLinear)
            weight = base.dequantized() if few_bits else base.get_parameter(which)
            rounded = (new.t() if few_bits and base.transposed else new).double() - weight.double()
            error += (rounded - change).square().sum().item()
            update += change.square().sum().item()
    return (error / update) ** 0.5 if update else 0.0


def _load(path: str, scores: bool, trusted: bool, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    return load_whole(kind, path, "export", dtype=dtype, trust_remote_code=trusted).eval()


@torch.no_grad()
def _outputs(model: nn.Module, ids: Tensor, scores: bool) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()
    return logits if scores else logits.log_softmax(dim=-1)
