"""Whether two model folders give the same outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from src.models.loading import adapter_base
from src.utils.seeding import generator


@dataclass(frozen=True)
class Comparison:
    """The distance of two models on a probe."""

    difference: float  # largest absolute difference: of log-probabilities in nats, or of scores
    dtype: torch.dtype
    original: str  # what the exported model was compared with, in words


def largest_difference(source: Path, exported: Path, base: str | None, scores: bool) -> Comparison:
    """The exported folder against the model that a run saved in `source`: base and adapter where both are at hand.

    The probe is two sequences of 16 random tokens. `scores`: compare the scores of reward models.
    """
    copied = _load(str(exported), scores)
    ids = torch.randint(copied.config.vocab_size, (2, 16), generator=generator(0, "probe"))
    adapter = source / "adapter"
    known = adapter_base(str(adapter)) if adapter.is_dir() else None
    if known is not None and base is not None and (Path(known) / "config.json").is_file():
        original: torch.nn.Module = PeftModel.from_pretrained(_load(known, scores, copied.dtype), adapter).eval()
        name = "base and adapter"
    else:
        original, name = _load(str(source / "model"), scores), "the run's model"
    outputs = [_outputs(model, ids, scores) for model in (copied, original)]
    return Comparison((outputs[0] - outputs[1]).abs().max().item(), copied.dtype, name)


def _load(path: str, scores: bool, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def _outputs(model: torch.nn.Module, ids: Tensor, scores: bool) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()
    return logits if scores else logits.log_softmax(dim=-1)
