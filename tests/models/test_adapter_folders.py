"""Folders of peft as people have them: served, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from src.errors import ModelError
from src.models.loading import build_tokenizer, load_causal_lm, load_config, load_reward_model, load_tokenizer
from src.stages import checks
from tests.tiny import FOREIGN_WARNINGS, make_roles, model_settings, tokenizer, write_lm

pytestmark = [
    *FOREIGN_WARNINGS,
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),  # peft, of the base's vocabulary
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
IDS = torch.tensor([[4, 7, 9, 5, 6]])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A policy's adapter, and no tokenizer."""
    make_roles(write_lm(tmp_path / "base"), spread=0.2).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def configure(folder: Path, **changes: Any) -> str:
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | changes))
    return str(folder)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(adapter: Path) -> None:
    assert load_tokenizer(str(adapter)).get_vocab() == tokenizer().get_vocab()


def with_more_words(folder: Path) -> tuple[str, PreTrainedTokenizerBase]:
    """An adapter that was trained after two tokens were added, with the embedding that peft saves then."""
    larger = tokenizer()
    larger.add_tokens(["one", "two"])
    base = AutoModelForCausalLM.from_pretrained(write_lm(folder / "base"))
    base.resize_token_embeddings(len(larger))
    peft = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    peft.save_pretrained(folder / "adapter")
    larger.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), larger


def test_an_adapter_with_a_resized_embedding_is_loaded_with_its_own(tmp_path: Path) -> None:
    path, larger = with_more_words(tmp_path)
    settings = model_settings(path)
    assert load_config(path).vocab_size == len(larger)
    assert len(build_tokenizer(settings)) == len(larger)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(larger))
    plain = PeftModel.from_pretrained(base, path).eval()
    ids = torch.tensor([[4, len(larger) - 1, 9, len(larger) - 2]])
    with torch.no_grad():
        assert_close(load_causal_lm(settings)(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_an_adapter_of_a_prompt_is_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(write_lm(tmp_path / "base"))
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="a PROMPT_TUNING adapter that adds to the prompt cannot be merged"):
        load_causal_lm(model_settings(str(tmp_path / "adapter")))


def test_an_adapter_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"it has adapter_config\.json, but no adapter_model\.safetensors$"):
        load_config(str(adapter))


def test_a_kind_of_adapter_that_nobody_knows_is_refused(adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"peft cannot read adapter_config.json \(.*NOPE"):
        load_causal_lm(model_settings(configure(adapter, peft_type="NOPE")))


def write_classifier(folder: Path, **options: Any) -> str:
    """A LoRA sequence classifier, as peft saves one."""
    base = AutoModelForSequenceClassification.from_pretrained(write_lm(folder / "base"), num_labels=1, pad_token_id=0)
    config = LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False, **options)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def test_a_lora_sequence_classifier_is_a_reward_model(tmp_path: Path) -> None:
    """With its head: reference is peft's own model, read at the last token."""
    path = write_classifier(tmp_path)
    checks._check_reward_model(path)
    model, words = load_reward_model(path)
    assert words.get_vocab() == tokenizer().get_vocab()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
    plain = PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_without_a_score_head_is_no_reward_model(adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"is no trained reward model: its adapter has no score head"):
        load_reward_model(str(adapter))


@pytest.mark.parametrize(
    "changes", [{"activation_function": "nope"}, {"n_layer": "two"}, {"n_head": 0}, {"n_embd": -4}]
)
def test_a_config_that_nothing_can_be_built_from_is_one_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_lm(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ModelError, match=r"no usable model at \S+ \(model\.path\): .+") as refused:
        load_causal_lm(model_settings(path))
    assert "\n" not in str(refused.value)
    assert not str(refused.value).endswith(":")


def test_an_adapter_whose_base_leads_back_to_it_is_refused(adapter: Path, tmp_path: Path) -> None:
    """By itself, and by way of another adapter."""
    other = shutil.copytree(adapter, tmp_path / "other")
    for base in (adapter, other):
        path = configure(adapter, base_model_name_or_path=str(base))
        configure(other, base_model_name_or_path=path)
        for load in (load_config, load_tokenizer, lambda path: load_causal_lm(model_settings(path))):
            with pytest.raises(ModelError, match=r"base_model_name_or_path leads back to it; name the base in its"):
                load(path)


@pytest.mark.parametrize("content", ["{}", '{"peft_type": "LORA", "base_model_name_or_path": 3}'])
def test_an_adapter_config_of_another_shape_is_one_sentence(content: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(content)
    for load in (load_config, load_tokenizer):
        with pytest.raises(
            ModelError, match=r"no usable adapter at '.*': (peft cannot read adapter_config.json|a LORA)"
        ):
            load(str(adapter))
