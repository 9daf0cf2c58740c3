"""Attention within rows against the softmax written out, row by row and head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.kernels import attention as short_attention
from src.kernels.attention import short_rows

LENGTHS, SIZE, SCALING = [5, 1, 19, 3], 4, 0.3


@pytest.fixture(params=[8, 128], ids=["tiles", "whole rows"], autouse=True)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many queries are done at once: of the row of 19 either 16 and 3, or all."""
    monkeypatch.setattr(short_attention, "TILE", request.param)


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    found, start = torch.zeros_like(query).transpose(1, 2), 0
    for length in LENGTHS:
        for head in range(query.shape[1]):
            for token in range(length):
                first = 0 if window is None else max(0, token - window + 1)
                seen = slice(start + first, start + token + 1)
                scores = key[0, head // groups, seen] @ query[0, head, start + token] * SCALING
                mean = scores.softmax(0) @ value[0, head // groups, seen]
                found = found.index_put((torch.tensor(0), torch.tensor(start + token), torch.tensor(head)), mean)
        start += length
    return found


def states(heads: int, groups: int) -> list[Tensor]:
    """Queries, keys and values as layers cut them out of one tensor of tokens."""
    tokens, kinds = sum(LENGTHS), heads // groups
    whole = torch.randn(1, tokens, heads + 2 * kinds, SIZE, generator=torch.Generator().manual_seed(0)).double()
    return [x.transpose(1, 2).requires_grad_() for x in whole.split([heads, kinds, kinds], dim=2)]


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (6, 3)], ids=["own keys", "shared keys"])
def test_numbers_and_gradients_are_those_of_the_formula(heads: int, groups: int, window: int | None) -> None:
    given = states(heads, groups)
    found, wanted = short_rows(*given, LENGTHS, SCALING, window), written_out(*given, window)
    assert_close(found, wanted, atol=1e-13, rtol=0)
    above = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    slopes = [torch.autograd.grad(y, given, above) for y in (found, wanted)]
    assert_close(*slopes, atol=1e-12, rtol=0)
    assert all(slope.abs().max() > 1e-3 for slope in slopes[0][2:] if window != 1)


def test_nothing_is_kept_where_nothing_learns() -> None:
    given = [x.detach() for x in states(3, 1)]
    assert_close(short_rows(*given, LENGTHS, SCALING), written_out(*given, None), atol=1e-13, rtol=0)


def test_a_second_derivative_is_refused() -> None:
    query, key, value = states(3, 1)
    (slope,) = torch.autograd.grad((short_rows(query, key, value, LENGTHS, 1.0) ** 2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


def test_what_no_query_sees_is_not_computed() -> None:
    """Of each tile the weights that are kept for the way back end with the last key that its last query sees."""
    query, key, value = states(2, 1)
    kept = [x for x in short_rows(query, key, value, LENGTHS, SCALING).grad_fn.saved_tensors if x.dim() == 3]
    whole = short_attention.TILE == 128
    rows = [(5, 5), (1, 1), (19, 19), (3, 3)] if whole else [(5, 5), (1, 1), (3, 19), (16, 16), (3, 3)]
    assert [tuple(weights.shape[1:]) for weights in kept] == rows
