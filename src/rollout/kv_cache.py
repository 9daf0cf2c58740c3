"""A key-value cache for rollouts, behind transformers' own interface: written in place, and rows leave it cheaply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from src.core.masking import position_ids
from src.kernels import padding_free

COLUMNS = 64  # by which a layer grows: one copy of it for so many tokens, where transformers' own makes one per token
PIECE = 1024  # tokens of one forward pass over prompts: enough to keep a core busy, so few that rows are of like length


class GrowingLayer(DynamicLayer):
    """Keys and values (B, heads, S, D) as the filled part of larger buffers.

    `DynamicLayer` copies all of it for each new token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, N, D); returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, filled = key_states.shape[0], self.get_seq_length()
        total = filled + key_states.shape[2]
        if self._buffers is None or total > self._buffers[0].shape[2]:
            self._buffers = self._room(key_states, total), self._room(value_states, total)
            if filled:
                self._buffers[0][:, :, :filled], self._buffers[1][:, :, :filled] = self.keys, self.values  # type: ignore[assignment]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, filled:total] = states
        self.keys, self.values = (buffer[:rows, :, :total] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was. Only rows that change are copied, unless there come to be more."""
        assert self.keys is not None
        assert self.values is not None
        if len(beam_idx) > len(self.keys):  # a prompt for several samples
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # as in `reorder`
            self._buffers = None
            return
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        for states in (self.keys, self.values):
            states[moved] = states[beam_idx[moved]]
        self.keys, self.values = self.keys[: len(beam_idx)], self.values[: len(beam_idx)]

    @staticmethod
    def _room(states: Tensor, columns: int) -> Tensor:
        rows, heads, _, size = states.shape
        return states.new_empty(rows, heads, columns + COLUMNS, size)


def rollout_cache(config: PreTrainedConfig) -> DynamicCache:
    """transformers' cache for a model, its plain attention layers as `GrowingLayer`; all others stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def prefill(lm: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, DynamicCache]:
    """Logits (B, V) after each prompt, and the cache of all prompts; equal prompts are computed once.

    Prompts (B, P) are padded on the left, without a column that is padding in all of them
    (`trimmed`). Sorted by length they pass in pieces, each as wide as its longest prompt.
    """
    # the mask comes first, so `unique` sorts by length
    prompts, row_of = torch.cat([prompt_mask.long(), prompt_ids], dim=1).unique(dim=0, return_inverse=True)
    cache, width = rollout_cache(lm.config), prompt_ids.shape[1]
    plain = all(type(layer) in (GrowingLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    pieces = prompts.chunk(-(-len(prompts) * width // PIECE) if plain else 1)
    if len(pieces) == 1:
        logits = _pass(lm, prompts, cache)
    else:
        caches = [DynamicCache(config=lm.config) for _ in pieces]
        logits = torch.cat([_pass(lm, *part) for part in zip(pieces, caches, strict=True)])
        for layer, *parts in zip(cache.layers, *(part.layers for part in caches), strict=True):
            layer.update(_stacked([part.keys for part in parts], width), _stacked([p.values for p in parts], width))
    reorder(cache, row_of)
    return logits[row_of], cache


def next_logits(lm: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after ids (B, N), which join the cache; mask (B, S) is that of all its columns then."""
    output = lm(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def trimmed(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, P) without the first columns in which the mask (B, P) counts nothing in any row."""
    return x[:, int(mask.any(dim=0).int().argmax()) :]


def reorder(cache: DynamicCache, index: Tensor) -> None:
    """Row i of all layers becomes what row `index[i]` was; index (N,) int64, any N."""
    cache.reorder_cache(index)  # type: ignore[arg-type]  # a LongTensor is no class of its own


def _pass(lm: PreTrainedModel, prompts: Tensor, cache: DynamicCache) -> Tensor:
    """The logits (N, V) after each prompt (N, 2P), its mask beside its ids; columns of padding alone are left out."""
    mask, ids = prompts.chunk(2, dim=1)
    mask, ids = trimmed(mask, mask), trimmed(ids, mask)
    plain = {type(layer) for layer in cache.layers} <= {GrowingLayer, DynamicLayer}
    if plain and padding_free.saves_time(lm.base_model, mask):
        states = padding_free.states(lm.base_model, mask.bool(), cache, input_ids=ids)
        logits: Tensor = lm.get_output_embeddings()(states[:, -1])
        return logits
    return next_logits(lm, ids, mask, position_ids(mask), cache)


def _stacked(parts: list[Tensor], width: int) -> Tensor:
    """Pieces (N, heads, S, D) of one layer as (B, heads, width, D), padded on the left."""
    return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
