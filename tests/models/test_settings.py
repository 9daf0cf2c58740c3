"""What a model's settings refuse, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from src.data.tokenizers import word_level
from src.errors import SettingError
from src.models.settings import LoraSettings, ModelSettings, ScratchSettings
from tests.tiny import EOS, LORA, PAD, TEXTS, model_settings

SCRATCH = ScratchSettings(partial(GPT2Config, n_layer=1, n_head=2, n_embd=4), word_level)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("dropout", -0.1), ("layers", 0)],
)
def test_an_adapter_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"{name} must be") as refused:
        replace(LORA, **{name: value})
    assert (refused.value.name, refused.value.value) == (name, value)


def test_a_model_from_nowhere_or_of_an_unknown_precision_is_refused() -> None:
    with pytest.raises(SettingError, match="path must be a hub name or a folder"):
        model_settings(None)
    assert model_settings(None, scratch=SCRATCH).path is None
    with pytest.raises(SettingError, match="dtype must be one of float32, bfloat16, float16, float64"):
        model_settings("x", dtype="int8")


@pytest.mark.parametrize(("changes", "message"), [
    ({"quantize": "fp4"}, "quantize must be nf4 or int8, or null"),
    ({"quantize": "nf4", "lora": None}, "lora must be an adapter's settings with quantize=nf4"),
    ({"quantize": "int8", "dtype": "float64"}, "dtype must be bfloat16, float16 or float32 with quantize=int8"),
])  # fmt: skip
def test_weights_of_few_bits_are_frozen(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        model_settings("x", **changes)


def test_a_model_needs_no_more_than_its_name_and_place() -> None:
    """Nothing of its folder is run, and a CPU takes the fast ways, unless asked otherwise."""
    settings = ModelSettings("m", "folder", "bfloat16", "eager", False, LoraSettings(1, 1, 0.0, "all-linear"), None)
    assert settings.load_options() == {
        "dtype": torch.bfloat16, "attn_implementation": "eager", "trust_remote_code": False,
    }  # fmt: skip
    assert (settings.fast_cpu, settings.prepack) == (True, True)


def test_a_model_from_scratch_has_the_vocabulary_and_the_tokens_of_its_tokenizer() -> None:
    tokenizer = SCRATCH.tokenizer(TEXTS)
    config = SCRATCH.config_for(tokenizer, num_labels=1)
    assert (config.vocab_size, config.num_labels, config.n_embd) == (len(tokenizer), 1, 4)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (EOS, EOS, PAD)
