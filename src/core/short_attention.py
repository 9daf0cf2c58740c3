"""Causal attention within each of many short rows, without padding and with a gradient worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class _ShortRows(torch.autograd.Function):
    """Keeps the weights of each row for the way back; all that is asked for is written where it belongs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None
    ) -> Tensor:
        ctx.lengths, ctx.scaling, ctx.groups = lengths, scaling, query.shape[1] // key.shape[1]
        bias = _bias(max(lengths), window, query)
        found = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        kept = []
        for row in _rows(lengths):
            q, k, v = _row(query, row, ctx.groups), _row(key, row), _row(value, row)
            length = k.shape[1]
            unseen = bias[:length, :length].repeat(ctx.groups, 1)
            weights = torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=scaling).softmax(dim=-1)
            found[row] = _tokens(weights @ v, ctx.groups)
            kept.append(weights)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, *kept)
        return found.unsqueeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = (x.new_empty(x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value))
        for row, weights in zip(_rows(ctx.lengths), kept, strict=True):
            q, k, v = _row(query, row, ctx.groups), _row(key, row), _row(value, row)
            g = _row(above.transpose(1, 2), row, ctx.groups)
            of_weights = g @ v.transpose(1, 2)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            of_query[row] = _tokens(of_scores @ k, ctx.groups)
            of_key[row] = _tokens(of_scores.transpose(1, 2) @ q)
            of_value[row] = _tokens(weights.transpose(1, 2) @ g)
        return *(x.transpose(0, 1).unsqueeze(0) for x in (of_query, of_key, of_value)), None, None, None


def short_rows(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int | None = None
) -> Tensor:
    """O = P V, P = softmax(c Q K^T) over what is seen: of its row each token sees itself and those before.

        dV = P^T dO,  dS = c P (dP - rowsum(dP P)) with dP = dO V^T,  dQ = dS K,  dK = dS^T Q

    With a window the last so many, itself included. Heads that share keys are done at once. Source: "Attention Is All
    You Need" (https://arxiv.org/abs/1706.03762). PyTorch's own calls more operators, or is made for long rows.
    Shapes: query (1, heads, N, D), key and value (1, heads / groups, N, D), N the sum of the lengths -> (1, N, heads,
    D). The gradient cannot be differentiated again: that raises `RuntimeError`.
    """
    result: Tensor = _ShortRows.apply(query, key, value, lengths, scaling, window)  # type: ignore[no-untyped-call]
    return result


def _bias(length: int, window: int | None, like: Tensor) -> Tensor:
    """0 where a token (row) sees another (column), the lowest number elsewhere; for a shorter row its upper left."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return like.new_zeros(length, length).masked_fill_(~seen, torch.finfo(like.dtype).min)


def _rows(lengths: list[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _row(x: Tensor, row: slice, groups: int = 1) -> Tensor:
    """Of (1, heads, N, D) one row of n tokens: (heads / groups, groups n, D)."""
    _, heads, tokens, size = x.shape
    return x[0].view(heads // groups, groups, tokens, size)[:, :, row].flatten(1, 2)


def _tokens(x: Tensor, groups: int = 1) -> Tensor:
    """(heads / groups, groups n, D) -> (n, heads, D)."""
    kinds, rows, size = x.shape
    return x.view(kinds * groups, rows // groups, size).transpose(0, 1)
