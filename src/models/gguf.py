"""Models and tokenizers in one GGUF file, as llama.cpp keeps them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from src.errors import ModelError
from src.models.accounting import refuse
from src.utils.hub import for_hub


def source(path: str, key: str = "model.path") -> dict[str, str]:
    """The arguments by which transformers' `from_pretrained` finds a GGUF file, a folder or a name on the hub.

    Raises `ModelError` for a GGUF file that is not there, and without the package that reads such files.
    """
    if not is_gguf(path):
        return {"pretrained_model_name_or_path": for_hub(path)}
    file = Path(path).expanduser()
    if not file.is_file():
        raise ModelError(f"{key}={path}: there is no such file")
    if find_spec("gguf") is None:
        raise ModelError(f"{key}={path}: a GGUF file is read by the package gguf: pip install -e '.[real]'")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def is_gguf(path: str) -> bool:
    """Whether the path is that of a GGUF file."""
    return path.lower().endswith(".gguf")


def load_gguf(path: str, **options: Any) -> PreTrainedModel:
    """The language model in a GGUF file, every tensor of it accounted for. Raises `ModelError`."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(**source(path), output_loading_info=True, **options)
    lm, info = loaded
    refuse(f"no usable model at {path!r}", type(lm).__name__, info["missing_keys"], info["unexpected_keys"])
    return unquantized(lm)


def unquantized(lm: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that has forgotten the file: transformers refuses to save one that came from GGUF."""
    config = type(lm.config).from_dict({k: v for k, v in lm.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config, dtype=lm.dtype, attn_implementation=lm.config._attn_implementation)
    plain.load_state_dict(lm.state_dict())
    plain.generation_config = lm.generation_config
    return plain
