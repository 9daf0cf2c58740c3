"""Small models with random weights of the architectures that `model=` offers, each with a tokenizer made from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from src.data.tokenizers import byte_level_bpe
from tests.tiny import seeded

TEXTS = [
    "How many apples are left? There are 3 apples left. #### 3",
    "\n\nHuman: What is good for the garden?\n\nAssistant: Water and some sun.",
    "The film was long, and the music was fine.",
]
BLOCKS: dict[str, dict[str, Any]] = {  # width 16, two layers, two heads
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "pythia-160m": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "smollm2-135m": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "smollm2-135m-instruct": {
        "hidden_size": 16, "num_hidden_layers": 10, "num_attention_heads": 2, "intermediate_size": 32,
        "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b-instruct": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
    "llama-3.2-1b-instruct": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
CLASSES: dict[str, type[PretrainedConfig]] = {
    "gpt2": GPT2Config,
    "pythia-160m": GPTNeoXConfig,
    "smollm2-135m": LlamaConfig,
    "smollm2-135m-instruct": LlamaConfig,
    "qwen2.5-0.5b-instruct": Qwen2Config,
    "llama-3.2-1b-instruct": LlamaConfig,
}
# of the true models; the others read far more
CONTEXT = {"gpt2": 1024, "pythia-160m": 2048, "smollm2-135m": 8192, "smollm2-135m-instruct": 8192}
CHATS = ("smollm2-135m-instruct", "qwen2.5-0.5b-instruct", "llama-3.2-1b-instruct")
ROOT = Path(__file__).parents[1]


def tokenizer_of(family: str, texts: list[str] = TEXTS) -> PreTrainedTokenizerBase:
    """Bytes and a few merges; Llama's puts a start token before every text, and the instruct models have a template."""
    tokenizer = byte_level_bpe(texts, 300)
    # transformers gives every tokenizer beside a Qwen2 model the last one, which the true ones have
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    if family in CHATS:
        tokenizer.chat_template = (ROOT / "templates/chatml.jinja").read_text()
    if family == "llama-3.2-1b-instruct":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
    return tokenizer


def config_of(family: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PretrainedConfig:
    """The architecture with the context of the true model and weights that tell tokens apart."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    length = CONTEXT.get(family, 32768)
    options = {"vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": length}
    if family == "gpt2":
        options["n_positions"] = options.pop("max_position_embeddings")
    return CLASSES[family](**(options | ids | BLOCKS[family] | changes))


def write_family(folder: Path, family: str, texts: list[str] = TEXTS, **changes: Any) -> str:
    """A folder with model and tokenizer, as the hub would give it."""
    tokenizer = tokenizer_of(family, texts)
    model = seeded(lambda: AutoModelForCausalLM.from_config(config_of(family, tokenizer, **changes)), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # norms and biases are ones and zeros when fresh
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.1, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
