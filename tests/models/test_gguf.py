"""A GGUF file as a model: the weights, tokens and texts of the folder that it was made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src.errors import ModelError
from src.models.loading import load_causal_lm, load_config, load_tokenizer
from src.models.settings import ModelSettings

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "abc", "de"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_hidden_layers=2, max_position_embeddings=64, rope_theta=5000.0, **SIZES)
    ).eval()


@pytest.fixture(scope="module")
def file(lm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as a GGUF file in float32, written with the package of the format's own project."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, config = gguf.GGUFWriter(str(path), "llama"), lm.config
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(32)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([2, 3, 3, *([1] * 29)])
    writer.add_token_merges(["a b", "ab c", "d e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in lm.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        own = weight if heads is None else rotated(weight, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), own.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key weight in the order of llama.cpp, which turns neighbors where Llama turns halves."""
    size = weight.shape[0] // heads
    return weight.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def test_it_is_the_model_that_was_written(lm: LlamaForCausalLM, file: str) -> None:
    found = load_causal_lm(ModelSettings(path=file))
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, lm(ids).logits)
    assert load_config(file).num_key_value_heads == 2


def test_it_is_saved_as_a_plain_folder(file: str, tmp_path: Path) -> None:
    found = load_causal_lm(ModelSettings(path=file))
    found.save_pretrained(tmp_path)
    again = load_causal_lm(ModelSettings(path=str(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))


def test_its_tokenizer_comes_along(file: str) -> None:
    tokenizer = load_tokenizer(file)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.eos_token_id == 2
    found = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == ["abc", "de", "f"]


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"model\.path=/nowhere/a\.gguf: there is no such file"):
        load_config("/nowhere/a.gguf")


def test_without_the_package(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.models.gguf.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"a GGUF file is read by the package gguf: pip install -e '\.\[real\]'"):
        load_config(file)


def test_something_else_of_that_name(tmp_path: Path) -> None:
    for name, content in (("a.gguf", b"not a model"), ("b.GGUF", b""), ("c.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 16)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"no usable model at '.*{name}' .*it cannot be read as a GGUF file: .+"):
            load_config(str(tmp_path / name))


def test_a_folder_of_such_files_says_how_one_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.Q8_0.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"the folder holds GGUF files, of which one is given by its name: .*/a\.Q8_0"):
        load_config(str(tmp_path))
