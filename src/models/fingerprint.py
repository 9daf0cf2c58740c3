"""Short names for the content of weights and tokenizers: the same numbers give the same name, whatever the path."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def fingerprint(model: nn.Module, *, frozen_only: bool = False) -> str:
    """SHA-256 (64 hex digits) over name, dtype, shape and bytes of every parameter, or of the frozen ones alone."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not (frozen_only and parameter.requires_grad):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (64 hex digits) over the tokenizer's own JSON (its vocabulary, where it has none) and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(f"{content}\n{special}".encode()).hexdigest()
