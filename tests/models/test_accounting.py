"""Weights that do not fit their config.json are refused with the names of the tensors; none is ever made at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from src.errors import ModelError
from src.models.loading import load_causal_lm, load_reward_model
from src.models.reward_choices import Pretrained
from tests.models.architectures import SIZES, write
from tests.tiny import (
    FOREIGN_WARNINGS,
    gpt2_config,
    make_roles,
    model_settings,
    seeded,
    tokenizer,
    write_lm,
    write_reward_model,
)

pytestmark = FOREIGN_WARNINGS

HEADS = "transformer.h.1.attn.c_attn.weight"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors") -> str:
    """Other tensors in a file of weights."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})
    return str(folder)


def configure(folder: Path, **changes: Any) -> str:
    """Other values in config.json."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    return str(folder)


def load(path: str) -> Any:
    return load_causal_lm(model_settings(path))


def sharded(folder: Path) -> dict[str, Any]:
    """A model in several files; returns their index."""
    seeded(lambda: GPT2LMHeadModel(gpt2_config()), 0).save_pretrained(folder, max_shard_size="5KB")
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    return index


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    write_lm(tmp_path)
    with pytest.raises(ModelError, match=rf"lacks the weights {HEADS} of GPT2LMHeadModel; weights and config.json"):
        load(edit(tmp_path, lambda tensors: tensors.pop(HEADS)))


def test_more_layers_than_the_weights_have_are_refused(tmp_path: Path) -> None:
    write_lm(tmp_path, n_layer=3)
    with pytest.raises(ModelError, match=r"lacks the weights transformer\.h\.3\.\S+, .* and 21 more of GPT2"):
        load(configure(tmp_path, n_layer=5))  # two layers of twelve tensors, three of which are named


def test_fewer_layers_than_the_weights_have_are_refused(tmp_path: Path) -> None:
    write_lm(tmp_path, n_layer=3)
    with pytest.raises(ModelError, match=r"it holds transformer\.h\.2\.\S+, .*, which GPT2LMHeadModel does not have"):
        load(configure(tmp_path, n_layer=2))


def test_heads_of_another_size_are_refused_with_both_shapes(tmp_path: Path) -> None:
    """Llama writes the size of a head, so twice the heads are twice the rows; GPT-2's weights do not show it."""
    write(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"self_attn\.\S+ has the shape \[\d+, \d+\], but config.json makes it \["):
        load(configure(tmp_path, num_attention_heads=4))


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)
    seeded(lambda: MixtralForCausalLM(config), 0).save_pretrained(tmp_path)
    experts = [name for name in load_file(tmp_path / "model.safetensors") if "experts.2" in name]
    assert len(experts) == 2 * 3  # in two layers: gate, up and down
    with pytest.raises(ModelError, match="experts"):
        load(edit(tmp_path, lambda tensors: [tensors.pop(name) for name in experts]))


def test_a_model_in_several_files_is_loaded_whole(tmp_path: Path) -> None:
    sharded(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load(str(tmp_path)).state_dict().items())


def test_an_index_of_one_tensor_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    first = dict(list(index["weight_map"].items())[:1])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": first}))
    with pytest.raises(ModelError, match=r"lacks the weights \S+, \S+, \S+ and \d+ more of GPT2LMHeadModel"):
        load(str(tmp_path))


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/tmp/model.safetensors", "..\\model.safetensors"])
def test_an_index_never_leads_out_of_its_folder(place: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    write_lm(tmp_path / "other")
    places = dict.fromkeys(index["weight_map"], place)
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": places}))
    with pytest.raises(ModelError, match="which is outside of its folder: it is not opened"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="is no index of weights: it has no weight_map or no metadata"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_are_not_read_as_weights(kind: torch.dtype, tmp_path: Path) -> None:
    write_lm(tmp_path)
    name = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[kind]
    with pytest.raises(ModelError, match=rf"{HEADS} is stored as {name}; quantized weights are not supported"):
        load(edit(tmp_path, lambda tensors: tensors.update({HEADS: (tensors[HEADS] * 10).to(kind)})))


def test_quantized_tensors_in_a_file_of_torch_are_not_read_as_weights(tmp_path: Path) -> None:
    write_lm(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(load(str(tmp_path)).state_dict()[HEADS], tensors[HEADS])
    torch.save(tensors | {HEADS: tensors[HEADS].to(torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"{HEADS} is stored as torch.int8"):
        load(str(tmp_path))


def test_a_quantized_model_is_refused_by_its_method(tmp_path: Path) -> None:
    write_lm(tmp_path)
    for method in ("fp8", "gptq", "bitsandbytes", "nobody_knows"):
        with pytest.raises(ModelError, match=rf"its weights are quantized \({method}\), which is not supported"):
            load(configure(tmp_path, quantization_config={"quant_method": method}))


def test_buffers_that_older_versions_wrote_are_no_weights(tmp_path: Path) -> None:
    """GPT-2's causal mask and GPT-NeoX's, as the hub's files have them."""
    write_lm(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
    load(edit(tmp_path / "gpt2", lambda tensors: tensors.update({"transformer.h.0.attn.bias": mask})))
    write(tmp_path / "neox", "gpt_neox")
    older = {
        "gpt_neox.layers.0.attention.bias": mask.bool(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    load(edit(tmp_path / "neox", lambda tensors: tensors.update(older)))


def test_one_half_of_an_encoder_decoder_is_no_language_model(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(tokenizer())}
    BartForConditionalGeneration(BartConfig(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a bart has an encoder and a decoder; PPO needs a decoder alone"):
        load(str(tmp_path))


def test_an_adapter_that_lacks_a_tensor_or_has_one_too_many_is_refused(tmp_path: Path) -> None:
    """peft warns, and starts the missing part anew."""
    make_roles(write_lm(tmp_path / "base"), spread=0.2).save_adapter(tmp_path / "adapter")
    file = "adapter_model.safetensors"
    name = next(iter(load_file(tmp_path / "adapter" / file)))
    kept = load_file(tmp_path / "adapter" / file)[name]
    edit(tmp_path / "adapter", lambda tensors: tensors.pop(name), file)
    with pytest.raises(ModelError, match=rf"lacks the weights {name} of the adapter"):
        load(str(tmp_path / "adapter"))
    other = name.replace(".h.0.", ".h.7.")
    edit(tmp_path / "adapter", lambda tensors: tensors.update({name: kept, other: kept.clone()}), file)
    with pytest.raises(ModelError, match=rf"it holds {other}, which the adapter does not have"):
        load(str(tmp_path / "adapter"))


def test_a_reward_model_with_a_layer_missing_is_refused(tmp_path: Path) -> None:
    write_reward_model(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(HEADS))
    with pytest.raises(ModelError, match=rf"lacks the weights {HEADS} of GPT2ForSequenceClassification"):
        load_reward_model(str(tmp_path))
    with pytest.raises(ModelError, match=rf"lacks the weights {HEADS} of GPT2ForSequenceClassification"):
        Pretrained(str(tmp_path), lora=None, chat_template=False).build(tokenizer(), 1, with_lm_head=False)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_new_score_head_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is new is all that is new: the backbone's weights are the folder's."""
    path = write(tmp_path, name)
    net = Pretrained(path, lora=None, chat_template=False).build(tokenizer(), 1, with_lm_head=False)
    new = {
        "llama": "score.weight",
        "bert": "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, classifier.weight",
    }
    assert capsys.readouterr().out == f"{path}: new weights, not trained yet: {new[name]}\n"
    stored = load_file(tmp_path / "model.safetensors")
    own = {key: x for key, x in net.model.state_dict().items() if key not in new[name].split(", ")}
    assert all(torch.equal(x, stored[key]) for key, x in own.items())
