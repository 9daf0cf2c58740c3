"""The folder of a reward adapter: peft's files, and `reward.json` with the fingerprints of base and tokenizer."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from src.errors import ModelError
from src.models.fingerprint import base_fingerprint, tokenizer_fingerprint
from src.models.loading import run_part

FACTS = "reward.json"
FORMAT = 1


@dataclass(frozen=True)
class AdapterFacts:
    """What a reward adapter must be used with to give the scores of its training."""

    base: str  # fingerprint of the backbone's frozen weights
    tokenizer: str  # fingerprint of the tokenizer

    def write(self, folder: Path, bias: float) -> None:
        """Write them, and the constant that is added to the score, as `reward.json`."""
        content = {"format": FORMAT, **asdict(self), "bias": bias}
        (folder / FACTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class RewardAdapter:
    """A trained adapter as read from its folder."""

    path: str
    config: LoraConfig
    weights: dict[str, Tensor]  # of the LoRA layers, by peft's names
    head: nn.Linear  # w . h + b, frozen
    facts: AdapterFacts


def adapter_folder(path: str) -> Path:
    """The folder of the adapter at `path` (a run's folder or the adapter's). Raises `ModelError` if there is none."""
    folder = Path(run_part(path, "adapter"))
    lacking = [name for name in ("adapter_config.json", FACTS) if not (folder / name).is_file()]
    if lacking:
        raise ModelError(
            f"reward.path={path}: there is no reward adapter (no {' and no '.join(lacking)}); "
            f"train one with stage=reward reward_net=adapter, or use reward=learned for a separate model"
        )
    return folder


def load_adapter(path: str) -> RewardAdapter:
    """Read the adapter at `path`. Raises `ModelError` when its folder lacks something."""
    folder = adapter_folder(path)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise ModelError(f"{folder / FACTS}: format {facts.get('format')} is not the format {FORMAT} of this version")
    weights = load_peft_weights(str(folder), device="cpu")
    scores = [name for name in weights if name.endswith(".score.weight")]
    if len(scores) != 1:
        raise ModelError(f"reward.path={path} is no trained reward adapter: it lacks the weights of the score head")
    weight = weights.pop(scores[0])
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(facts["bias"])
    config = LoraConfig.from_pretrained(str(folder))
    return RewardAdapter(
        str(folder), config, weights, head.requires_grad_(False), AdapterFacts(facts["base"], facts["tokenizer"])
    )


def attach(adapter: RewardAdapter, peft: PeftModel, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the adapter's layers to a language model under `name`, frozen.

    Raises `ModelError` unless base and tokenizer are bit for bit those that the adapter was trained with.
    """
    lm = peft.get_base_model()
    for what, found, wanted in (
        ("model.path", base_fingerprint(lm.base_model), adapter.facts.base),
        ("the tokenizer", tokenizer_fingerprint(tokenizer), adapter.facts.tokenizer),
    ):
        if found != wanted:
            raise ModelError(
                f"reward.path={adapter.path}: the adapter was trained on another base: {what} "
                f"({lm.name_or_path}) has the fingerprint {found[:12]}, the adapter wants {wanted[:12]}; "
                f"train one on this base (stage=reward reward_net=adapter, with this model.dtype and model.quantize), "
                f"or use reward=learned with its model folder"
            )
    config = copy.deepcopy(adapter.config)
    config.task_type, config.modules_to_save, config.exclude_modules = "CAUSAL_LM", None, None
    peft.add_adapter(name, config)
    unknown = set_peft_model_state_dict(peft, adapter.weights, adapter_name=name).unexpected_keys
    own = [parameter for key, parameter in peft.named_parameters() if f".{name}." in key]
    if unknown or len(own) != len(adapter.weights):
        raise ModelError(f"reward.path={adapter.path}: its layers do not fit {lm.name_or_path}: {sorted(unknown)[:3]}")
    for parameter in own:
        parameter.requires_grad_(False)
