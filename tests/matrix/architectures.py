"""Architectures of transformers' causal language models, as small random copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.tiny import EOS, PAD, seeded, tokenizer

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = WIDE | {"num_key_value_heads": 2}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}

# model_type -> the sizes of its small copy; the name of a variant follows a colon
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": GROUPED | MANY | {"head_dim": 8, "num_dense_layers": 1, "layer_types": SLIDING, "sliding_window": 4},
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bamba": GROUPED | MAMBA | {"attn_layer_indices": [1]},
    "bert": WIDE,
    "biogpt": WIDE,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "cohere": GROUPED | {"logit_scale": 0.5},
    "cohere2": GROUPED | {"logit_scale": 0.5, "layer_types": SLIDING, "sliding_window": 4},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4},
    "deepseek_v2": WIDE | LATENT | ROUTED | {"topk_method": "greedy"},
    "deepseek_v3": WIDE | LATENT | ROUTED,
    "diffllama": GROUPED,
    "doge": GROUPED,
    "dots1": GROUPED | ROUTED | {"head_dim": 8},
    "ernie4_5": GROUPED | {"head_dim": 8},
    "ernie4_5_moe": GROUPED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "exaone4": GROUPED | {"layer_types": SLIDING, "sliding_window": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon:sequential": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "parallel_attn": False, "new_decoder_architecture": False, "alibi": True, "bias": True},  # noqa: E501
    "falcon_h1": GROUPED | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "falcon_mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    "flex_olmo": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 4},
    "gemma3": {
        "text_config": GROUPED | {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 4},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3_text": GROUPED | {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3n_text": GROUPED | {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2, "vocab_size_per_layer_input": len(tokenizer()), "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [48, 48]},  # noqa: E501
    "glm": GROUPED | {"head_dim": 8},
    "glm4": GROUPED | {"head_dim": 8},
    "glm4_moe": GROUPED | ROUTED | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},  # noqa: E501
    "gpt_neox": WIDE,
    "gpt_neox_japanese": WIDE,
    "gpt_oss": GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": SLIDING, "sliding_window": 4},  # noqa: E501
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "granite": GROUPED | {"logits_scaling": 2.0},
    "granitemoe": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "granitemoehybrid": GROUPED | MAMBA | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},  # noqa: E501
    "granitemoeshared": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "helium": GROUPED | {"head_dim": 8},
    "hunyuan_v1_dense": GROUPED | {"head_dim": 8},
    "jamba": GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},  # noqa: E501
    "jetmoe": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # noqa: E501
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "llama": GROUPED,
    "llama:biases": GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama4_text": GROUPED | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64},  # noqa: E501
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    "mamba2": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},  # noqa: E501
    "minimax": GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},  # noqa: E501
    "ministral": GROUPED | {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 4},
    "mistral": GROUPED | {"sliding_window": 4},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "modernbert-decoder": WIDE | {"layer_types": SLIDING, "local_attention": 8},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "nanochat": GROUPED,
    "nemotron": GROUPED | {"head_dim": 8},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"layer_types": SLIDING, "sliding_window": 4},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},  # noqa: E501
    "persimmon": WIDE,
    "phi": GROUPED,
    "phi3": GROUPED | {"sliding_window": 4},
    "phimoe": GROUPED | {"num_local_experts": 4},
    "qwen2": GROUPED,
    "qwen2_moe": GROUPED | MANY | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3": GROUPED | {"head_dim": 8},
    "qwen3_moe": GROUPED | MANY | {"head_dim": 8},
    "qwen3_next": GROUPED | MANY | LINEAR | {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": GROUPED | LINEAR,
    "recurrent_gemma": GROUPED | {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},  # noqa: E501
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "seed_oss": GROUPED | {"head_dim": 8},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0]},
    "stablelm": GROUPED,
    "starcoder2": GROUPED | {"sliding_window": 4},
    "vaultgemma": GROUPED | {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "zamba2": GROUPED | {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1},  # noqa: E501
}  # fmt: skip


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    """The small architecture, with the tests' vocabulary and a context of 64 tokens."""
    ids = {"vocab_size": len(tokenizer()), "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": PAD}
    sizes = ARCHITECTURES[name] | changes
    if "text_config" in sizes:  # a wrapper of several modalities
        sizes, ids = sizes | {"text_config": ids | sizes["text_config"]}, {}
    return AutoConfig.for_model(name.partition(":")[0], **(ids | sizes))


def write(folder: Path, name: str, **changes: Any) -> str:
    """A folder with a random copy whose layers all matter, and the tests' tokenizer."""
    model = seeded(lambda: AutoModelForCausalLM.from_config(config_of(name, **changes)), 0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5, generator=draws)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
