"""A key-value cache for rollouts with the interface of transformers: written in place, cheap to drop rows from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from src.core.masking import position_ids
from src.models.head_function import logits

COLUMNS = 64  # by which a layer grows: it is copied once per COLUMNS tokens, transformers' cache once per token
PIECE = 2**10  # tokens of one forward pass over prompts: enough to keep a core busy, few enough for similar lengths
PIECE_ON_GPU = 2**16


class GrowingLayer(DynamicLayer):
    """Keys and values (B, heads, S, D) in the filled part of larger buffers.

    `DynamicLayer` copies all of them for each new token.
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
        """Row i becomes row `beam_idx[i]`. Only rows that change are copied, unless the number of rows grows."""
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
    """transformers' cache for a model, with its plain attention layers replaced by `GrowingLayer`."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def prefill(lm: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, DynamicCache]:
    """Logits (B, V) after each prompt, and the cache of all prompts; equal prompts are computed once.

    Prompts (B, P) are padded on the left, without a column that is padding in all of them
    (`trimmed`). They are sorted by length and computed in pieces, each as wide as its longest prompt.
    """
    # the mask comes first, so `unique` sorts by length
    prompts, row_of = torch.cat([prompt_mask.long(), prompt_ids], dim=1).unique(dim=0, return_inverse=True)
    cache, width = rollout_cache(lm.config), prompt_ids.shape[1]
    plain = all(type(layer) in (GrowingLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    piece = PIECE if prompts.device.type == "cpu" else PIECE_ON_GPU
    pieces = prompts.chunk(-(-len(prompts) * width // piece) if plain else 1)
    if len(pieces) == 1:
        logits = _pass(lm, prompts, cache)
    else:
        caches = [DynamicCache(config=lm.config) for _ in pieces]
        logits = torch.cat([_pass(lm, *part) for part in zip(pieces, caches, strict=True)])
        for layer, *parts in zip(cache.layers, *(part.layers for part in caches), strict=True):
            layer.update(_stacked([part.keys for part in parts], width), _stacked([p.values for p in parts], width))
    reorder(cache, row_of)
    return logits[row_of], cache


@dataclass
class OpenRows:
    """N rows of a batch that go on, and what their next step reads: the token drawn last, after S cached columns."""

    index: Tensor  # (N,) in the batch
    cache: DynamicCache
    mask: Tensor  # (N, S)
    positions: Tensor  # (N,) of the token
    token: Tensor  # (N,)

    def keep(self, kept: Tensor) -> None:
        """Only the rows `kept` (K,) int64, in that order."""
        reorder(self.cache, kept)
        self.index, self.mask = self.index[kept], self.mask[kept]
        self.positions, self.token = self.positions[kept], self.token[kept]

    def read(self, lm: PreTrainedModel) -> Tensor:
        """The logits (N, V) after the token, which is added to the cache."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        logits = next_logits(lm, self.token.unsqueeze(1), self.mask, self.positions.unsqueeze(1), self.cache)
        self.positions = self.positions + 1
        return logits


def next_logits(lm: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after ids (B, N), which are added to the cache; mask (B, S) covers all its columns and these.

    A mask (B, 1, N, S) is passed on as it is. A model without attention reads the mask of the new columns alone.
    """
    name = cache_name(type(lm))
    if name == "cache_params":
        mask = mask[:, -ids.shape[1] :]
    output = lm(
        input_ids=ids,
        attention_mask=mask.long() if mask.dim() == 2 else mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
    )
    return output.logits[:, -1]


def cache_name(kind: type[PreTrainedModel]) -> str:
    """By which name a model takes its cache; one that is given by another name is ignored without an error."""
    names = inspect.signature(kind.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def trimmed(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, P) without the first columns in which the mask (B, P) is False in every row."""
    return x[:, int(mask.any(dim=0).int().argmax()) :]


def reorder(cache: DynamicCache, index: Tensor) -> None:
    """Row i of all layers becomes row `index[i]`; index (N,) int64, any N."""
    cache.reorder_cache(index)  # type: ignore[arg-type]  # LongTensor is not a separate class


def _pass(lm: PreTrainedModel, prompts: Tensor, cache: DynamicCache) -> Tensor:
    """The logits (N, V) after each prompt; a row (2P,) is its mask, then its ids. Columns of padding are left out."""
    mask, ids = prompts.chunk(2, dim=1)
    mask, ids = trimmed(mask, mask).bool(), trimmed(ids, mask)
    plain = {type(layer) for layer in cache.layers} <= {GrowingLayer, DynamicLayer}
    fast = getattr(lm.base_model, "fast_pass", None)
    if plain and fast is not None and fast.saves_time(lm.base_model, mask):
        states = fast.states(lm.base_model, mask, cache, input_ids=ids)
        return logits(lm.get_output_embeddings(), states[:, -1])
    return next_logits(lm, ids, mask, position_ids(mask), cache)


def _stacked(parts: list[Tensor], width: int) -> Tensor:
    """Pieces (N, heads, S, D) of one layer as (B, heads, width, D), padded on the left."""
    return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
