"""LoRA adapters: which layers they are put on, and by which way of adding them up."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from peft.tuners import lora as peft_lora
from torch import nn
from transformers import AutoModelForCausalLM

from src.errors import ModelError
from src.kernels.fast_adapters import AdaptedLinear
from src.models.adapters import add_adapter, linear_names, lora_config, sort_targets
from src.models.loading import load_causal_lm
from src.models.reward_choices import SharedBaseAdapter
from tests.matrix import architectures as matrix
from tests.models.architectures import DECODERS, write
from tests.tiny import FOREIGN_WARNINGS, LORA, make_roles, model_settings, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS
LINEAR = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "qwen2": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_linear_layers_have_the_same_names_with_adapters_and_without(name: str, tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(write(tmp_path, name))
    assert linear_names(lm.base_model) == LINEAR[name]
    add_adapter(lm, LORA, "policy")
    assert linear_names(lm.base_model) == LINEAR[name]


@pytest.mark.parametrize("name", DECODERS)
def test_adapters_in_the_top_layers_are_there_alone(name: str, tmp_path: Path) -> None:
    """And everything else is frozen."""
    lm = AutoModelForCausalLM.from_pretrained(write(tmp_path, name))
    peft = add_adapter(lm, replace(LORA, layers=1), "policy")
    trained = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(LINEAR[name] if name != "gpt2" else [*LINEAR[name], "c_proj of attention"])
    assert all(".policy." in n and (".1." in n) for n in trained)


def test_more_layers_than_there_are_and_unknown_layers_are_refused(tmp_path: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(write_lm(tmp_path))
    assert lora_config(replace(LORA, layers=2), lm).layers_to_transform == [0, 1]
    with pytest.raises(ModelError, match=r"model\.lora\.layers=3: the model has 2 layers"):
        lora_config(replace(LORA, layers=3), lm)
    with pytest.raises(ModelError, match=r"model\.lora\.targets=\['nowhere'\] does not fit"):
        add_adapter(lm, replace(LORA, targets=["nowhere"]), "policy")


def test_a_tower_for_pictures_has_none(tmp_path: Path) -> None:
    """No text goes through it, so an adapter there would never learn."""
    lm = load_causal_lm(model_settings(matrix.write(tmp_path, "gemma3")))
    peft = add_adapter(lm, LORA, "policy")
    inside = {name for name, module in peft.named_modules() if isinstance(module, peft_lora.Linear)}
    assert inside
    assert not [name for name in inside if "vision" in name or "projector" in name]
    assert [name for name, module in lm.named_modules() if "vision" in name and isinstance(module, nn.Linear)]


@pytest.mark.parametrize("fast", [True, False])
def test_the_fast_way_is_taken_where_the_model_was_loaded_with_it(fast: bool, tmp_path: Path) -> None:
    peft = add_adapter(load_causal_lm(model_settings(write_lm(tmp_path), fast_cpu=fast)), LORA, "policy")
    kinds = {type(module) for module in peft.modules() if isinstance(module, peft_lora.Linear)}
    assert kinds == {AdaptedLinear if fast else peft_lora.Linear}


def test_a_saved_adapter_does_not_depend_on_the_order_of_sets(tmp_path: Path) -> None:
    """peft writes sets as lists, in an order that Python draws anew for each process."""
    file = tmp_path / "adapter_config.json"
    names, layers = ["v_proj", "o_proj", "c_attn"], [5, 4]
    for order in permutations(names):
        file.write_text(json.dumps({"target_modules": order, "layers_to_transform": layers, "modules_to_save": None}))
        sort_targets(tmp_path)
        kept = {"target_modules": sorted(names), "layers_to_transform": layers, "modules_to_save": None}
        assert json.loads(file.read_text()) == kept


def test_policy_and_reward_are_saved_so(tmp_path: Path) -> None:
    backwards = ["c_proj", "c_fc", "c_attn"]
    settings = model_settings(write_lm(tmp_path / "base"))
    roles = make_roles(str(tmp_path / "base"))
    roles.peft.peft_config["policy"].target_modules = backwards
    roles.save_adapter(tmp_path / "policy")
    net = SharedBaseAdapter(settings, LORA).build(tokenizer(), 1, with_lm_head=False)
    net.classifier.peft_config["default"].target_modules = backwards
    net.save(tmp_path, tokenizer())
    for folder in ("policy", "adapter"):
        kept = json.loads((tmp_path / folder / "adapter_config.json").read_text())["target_modules"]
        assert kept == sorted(backwards)
