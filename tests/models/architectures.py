"""Tiny random models of several architectures, in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.tiny import EOS, PAD, gpt2_config, seeded, tokenizer

IDS = {"vocab_size": len(tokenizer()), "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
SIZES = {
    **IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
}
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_dropout=0.0, attention_dropout=0.0)),
}
ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=len(tokenizer()), dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=48,
            pad_token_id=PAD, initializer_range=0.3,
        )
    ),
}  # fmt: skip
ALL = DECODERS | ENCODERS


def write(folder: Path, name: str, seed: int = 0) -> str:
    """The model of that name and its tokenizer in a folder."""
    seeded(ALL[name], seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
