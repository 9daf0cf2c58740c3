"""Causal attention within each of many short rows, without padding, with a hand-written gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TILES = {torch.float32: 64}  # approximate number of queries per tile
TILE = 256  # in other precisions, as bfloat16 is faster with fewer and larger products


class _ShortRows(torch.autograd.Function):
    """Tiled causal attention; each tile has some queries of a row and sees keys up to its last query.

    The attention weights of each tile are kept for the backward pass; results are written in place.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None
    ) -> Tensor:
        ctx.lengths, ctx.scaling, ctx.groups = lengths, scaling, query.shape[1] // key.shape[1]
        bias = _bias(max(lengths), window, query)
        found = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        queries, keys, values = _by_keys(query, ctx.groups), _by_keys(key), _by_keys(value)
        kept = []
        for own, seen, _ in _tiles(lengths, query.dtype):
            q, k, v = _rows(queries, own), _rows(keys, seen), _rows(values, seen)
            tokens = seen.stop - seen.start
            unseen = bias[own.start - seen.start : tokens, :tokens].repeat(ctx.groups, 1)
            weights = torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=scaling).softmax(dim=-1)
            found[own] = _tokens(weights @ v, ctx.groups)
            kept.append(weights)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, *kept)
        return found.unsqueeze(0)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = (x.new_empty(x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value))
        queries, keys, values = _by_keys(query, ctx.groups), _by_keys(key), _by_keys(value)
        incoming = _by_keys(above.transpose(1, 2), ctx.groups)
        for (own, seen, whole), weights in zip(_tiles(ctx.lengths, query.dtype), kept, strict=True):
            q, k, v, g = _rows(queries, own), _rows(keys, seen), _rows(values, seen), _rows(incoming, own)
            of_weights = g @ v.transpose(1, 2)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            of_query[own] = _tokens(of_scores @ k, ctx.groups)
            _put(of_key[seen], of_scores.transpose(1, 2) @ q, whole)
            _put(of_value[seen], weights.transpose(1, 2) @ g, whole)
        return *(x.transpose(0, 1).unsqueeze(0) for x in (of_query, of_key, of_value)), None, None, None


def short_rows(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None = None
) -> Tensor:
    """O = P V, P = softmax(c Q K^T) over the visible keys: those of the same row up to the token itself.

        dV = P^T dO,  dS = c P (dP - rowsum(dP P)) with dP = dO V^T,  dQ = dS K,  dK = dS^T Q

    With a window, the last `window` of them. Heads that share keys are computed together. Source: "Attention Is All You
    Need" (https://arxiv.org/abs/1706.03762). PyTorch's attention calls more operators, or is made for long rows.
    Shapes: query (1, heads, N, D), key and value (1, heads / groups, N, D), N the sum of the lengths -> (1, N, heads,
    D). The gradient cannot be differentiated again: that raises `RuntimeError`.
    """
    result: Tensor = _ShortRows.apply(query, key, value, lengths, scaling, window)  # type: ignore[no-untyped-call]
    return result


def _bias(length: int, window: int | None, like: Tensor) -> Tensor:
    """0 where a token (row) sees another (column), the lowest number elsewhere; shorter rows use its upper left."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return like.new_zeros(length, length).masked_fill_(~seen, torch.finfo(like.dtype).min)


def _tiles(lengths: list[int], dtype: torch.dtype) -> Iterator[tuple[slice, slice, bool]]:
    """The tiles: slice of queries, slice of keys from the row's first to the last query, and whether it has all keys.

    The tile that has all keys of a row comes first.
    """
    start = 0
    for length in lengths:
        tiles = max(1, round(length / TILES.get(dtype, TILE)))
        size = math.ceil(length / tiles / 8) * 8  # matrix products of these sizes are faster
        for first in reversed(range(start, start + length, size)):
            stop = min(first + size, start + length)
            yield slice(first, stop), slice(start, stop), stop == start + length
        start += length


def _by_keys(x: Tensor, groups: int = 1) -> Tensor:
    """(1, heads, N, D) -> (heads / groups, groups, N, D)."""
    _, heads, tokens, size = x.shape
    return x[0].view(heads // groups, groups, tokens, size)


def _rows(x: Tensor, tokens: slice) -> Tensor:
    """n tokens of (kinds, groups, N, D): (kinds, groups n, D)."""
    return x[:, :, tokens].flatten(1, 2)


def _tokens(x: Tensor, groups: int = 1) -> Tensor:
    """(heads / groups, groups n, D) -> (n, heads, D)."""
    kinds, rows, size = x.shape
    return x.view(kinds * groups, rows // groups, size).transpose(0, 1)


def _put(place: Tensor, found: Tensor, whole: bool) -> None:
    """Write a tile's gradient of its keys, (kinds, n, D); the first tile has the whole row, the others add to it."""
    if whole:
        place.copy_(_tokens(found))
    else:
        place.add_(_tokens(found))
