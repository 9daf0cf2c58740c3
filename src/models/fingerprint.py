"""Fingerprints of weights and tokenizers: they depend on the content, not on the path."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from src.utils.distributed import whole

ADAPTED = ".base_layer"  # where peft keeps a layer that has an adapter
ADAPTERS = ("lora_", "modules_to_save")  # names that peft adds


def joint(*parts: object) -> str:
    """SHA-256 (64 hex digits) of several strings and plain numbers in this order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint(model: nn.Module, *, frozen_only: bool = False) -> str:
    """SHA-256 (64 hex digits) over name, dtype, shape and bytes of every parameter, or of the frozen ones alone."""
    return _digest({n: p for n, p in model.named_parameters() if not (frozen_only and p.requires_grad)})


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model without its adapters: the same before and after peft put them on it."""
    own = {n: p for n, p in model.named_parameters() if not any(part in n for part in ADAPTERS)}
    return _digest({name.replace(ADAPTED, ""): parameter for name, parameter in own.items()})


@torch.no_grad()
def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (64 hex digits) over everything that determines the ids of a text.

    That is the tokenizer's JSON (or its vocabulary, if it has none), special tokens and chat template; padding and
    truncation of batches are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    content = {name: part for name, part in rules.items() if name not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    whole = json.dumps([content, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
