"""Folders of peft: which base they name, and their adapters, loaded on it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict, load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import ModelError
from src.models.accounting import refuse
from src.models.adapters import sort_targets
from src.models.quantized import quantize, quantized_as

CONFIG = "adapter_config.json"
QUANTIZED = "quantized.json"  # how the base was held that an adapter was trained on; without it in plain weights
PREFIX = "base_model.model."  # that peft puts before the names of the base's tensors
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def adapter_config(path: str, above: frozenset[Path] = frozenset()) -> PeftConfig | None:
    """The configuration of the adapter in the folder `path`; None if it holds none. `above`: the adapters on it.

    Raises `ModelError` for an adapter that is no change of the base's weights, or whose base leads back to it.
    """
    if not (Path(path) / CONFIG).is_file():
        return None
    try:
        config = PeftConfig.from_pretrained(path)
        kind, base = config.peft_type.value, config.base_model_name_or_path
        if base is not None and not isinstance(base, str):
            raise TypeError(f"base_model_name_or_path is {base!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"no usable adapter at {path!r}: peft cannot read {CONFIG} ({error!r:.120})") from error
    if isinstance(config, PromptLearningConfig) or not base:
        lacking = "names no base" if not base else "adds to the prompt"
        raise ModelError(
            f"no usable adapter at {path!r}: a {kind} adapter that {lacking} cannot be merged into a "
            f"base; give a LoRA adapter or a whole model"
        )
    above |= {Path(path).resolve()}
    if Path(base).resolve() in above:
        raise ModelError(
            f"no usable adapter at {path!r}: base_model_name_or_path leads back to it; name the base in its {CONFIG}"
        )
    adapter_config(base, above)
    return config


def adapter_base(path: str) -> str | None:
    """The path of the base model if `path` is a folder that holds an adapter, else None."""
    config = adapter_config(path)
    return None if config is None else str(config.base_model_name_or_path)


def base_held_as(path: str) -> str | None:
    """How the base was held that the adapter at `path` was trained on, "nf4" or "int8"; None for plain weights."""
    file = Path(path) / QUANTIZED
    return str(json.loads(file.read_text(encoding="utf-8"))["quantize"]) if file.is_file() else None


def save_one(peft: PeftModel, name: str, folder: Path) -> bool:
    """Write the adapter `name` alone; peft writes it to a subfolder of that name, whose files are moved up.

    Returns False, and writes nothing, if the base was itself an adapter: peft cannot load one adapter on another.
    """
    if adapter_base(peft.get_base_model().name_or_path) is not None:
        return False
    peft.save_pretrained(str(folder), selected_adapters=[name])
    for file in (folder / name).iterdir():
        file.replace(folder / file.name)
    (folder / name).rmdir()
    sort_targets(folder)
    how = quantized_as(peft)
    if how is not None:
        (folder / QUANTIZED).write_text(json.dumps({"quantize": how}) + "\n", encoding="utf-8")
    return True


def vocabulary_rows(path: str) -> int | None:
    """The rows of the embedding that an adapter's folder brings along, as after new tokens; None without one."""
    names = _whole_tensors(path)
    return next((len(x) for name, x in names.items() if name.endswith(EMBEDDINGS)), None)


def load_whole_adapter(base: PreTrainedModel, path: str, key: str) -> PeftModel:
    """The adapter at `path` on its base, which is quantized first if it was when the adapter was trained.

    Raises `ModelError` unless the folder has its tensors, all and no others.
    """
    where, rows = f"no usable adapter at {path!r} ({key})", vocabulary_rows(path)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # the new rows are the folder's
    quantize(base, base_held_as(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # refused below, by name
        peft = PeftModel.from_pretrained(base, path)
    own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    stored, given = load_peft_weights(path, device="cpu"), dict(base.named_parameters(remove_duplicate=False))
    whole = {name for name, x in _whole_tensors(path).items() if _is_in(given, name.removeprefix(PREFIX), x)}
    refuse(where, "the adapter", set(own) - set(stored), set(stored) - set(own) - whole)
    return peft


def _whole_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of the base that an adapter's folder holds in full. Raises `ModelError` for one without weights."""
    if not any((Path(path) / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ModelError(f"no usable adapter at {path!r}: it has {CONFIG}, but no {SAFETENSORS_WEIGHTS_NAME}")
    return {name: x for name, x in load_peft_weights(path, device="cpu").items() if "lora_" not in name}


def _is_in(parameters: dict[str, torch.nn.Parameter], name: str, stored: Tensor) -> bool:
    """Whether the base now has that tensor, also under the name that a layer with an adapter has."""
    layer, _, kind = name.rpartition(".")
    found = parameters.get(name, parameters.get(f"{layer}.base_layer.{kind}"))
    return found is not None and torch.equal(found.detach().cpu(), stored.to(found.dtype))
