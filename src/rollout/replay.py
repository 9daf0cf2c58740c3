"""Decoding on a GPU: one step is captured as a graph and replayed, as its launches take longer than its work.

A graph needs buffers that stay in place: keys and values have room for a block of tokens, and a mask hides what is not
written yet. Nothing in a step asks the device for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from src.models.sharding import is_sharded
from src.rollout.kv_cache import COLUMNS, GrowingLayer, OpenRows, next_logits

REPLAYED = ("gpt2", "gpt_neox", "llama", "qwen2")  # architectures with a tested step
OTHER_MASKS = ("eager", "flash_attention_2", "flash_attention_3")  # attention that reads no mask of truth values
MOVING_ROPE = ("dynamic", "longrope")  # frequencies that are computed from the longest row

Draw = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # logits (N, V), uniforms (N,) -> tokens, logprobs


class FixedLayer(DynamicLayer):
    """Keys and values (B, heads, C, D) of a layer with room for more; tokens are written at `column` (1,)."""

    def __init__(self, layer: DynamicLayer, room: int, column: Tensor) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.keys, self.values = (pad(states, (0, 0, 0, room)) for states in (layer.keys, layer.values))
        layer.keys = layer.values = None  # not to hold all layers twice
        self.is_initialized, self._column = True, column

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token (B, heads, 1, D); returns all C columns."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values


class Block:
    """At most `room` decoding steps for rows that do not change; they are taken over."""

    def __init__(self, lm: PreTrainedModel, draw: Draw, rows: OpenRows, room: int) -> None:
        self.lm, self.draw, self._index = lm, draw, rows.index
        filled = rows.mask.shape[1]
        room += -(filled + room) % COLUMNS  # few sizes: attention is prepared for each new one, in some 50 ms
        self._column = torch.full((1,), filled, device=rows.mask.device)
        self._cache = DynamicCache(config=lm.config)
        self._cache.layers = [FixedLayer(layer, room, self._column) for layer in rows.cache.layers]  # type: ignore[arg-type]
        self._mask = pad(rows.mask, (0, room))[:, None, None]
        self._positions, self._token = rows.positions.unsqueeze(1).clone(), rows.token.unsqueeze(1).clone()
        self._u: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def rows(self) -> OpenRows:
        """The rows after all steps."""
        return OpenRows(self._index, self._cache, self._mask[:, 0, 0], self._positions[:, 0], self._token[:, 0])

    def step(self, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next token of each row and its logprob, (B,) each; overwritten by the next call.

        On a GPU the first call runs the step, the second captures it, and all others replay it.
        """
        if u is not None:
            self._u = u if self._u is None else self._u.copy_(u)
        if self._token.device.type != "cuda" or not self._warm:
            self._warm = True
            return self._step()
        return self._replay()

    def _replay(self) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._found = self._step()
        self._graph.replay()
        return self._found

    def _step(self) -> tuple[Tensor, Tensor]:
        self._mask.index_fill_(3, self._column, True)
        logits = next_logits(self.lm, self._token, self._mask, self._positions, self._cache)
        token, logprob = self.draw(logits, self._u)
        self._token.copy_(token.unsqueeze(1))
        self._positions.add_(1)
        self._column.add_(1)
        return token, logprob


def replayable(lm: PreTrainedModel, cache: DynamicCache, device: torch.device) -> bool:
    """Whether decoding is replayed: on a CUDA GPU, for a tested architecture with plain layers and attention.

    Sharded layers are called as they are: their hooks cannot be captured.
    """
    if device.type != "cuda" or lm.config.model_type not in REPLAYED or is_sharded(lm):
        return False
    rope = (getattr(lm.config, "rope_parameters", None) or {}).get("rope_type")
    plain = all(type(layer) is GrowingLayer for layer in cache.layers)
    return plain and rope not in MOVING_ROPE and lm.config._attn_implementation not in OTHER_MASKS
