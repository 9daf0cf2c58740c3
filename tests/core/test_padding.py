"""Rows of token ids as a rectangle."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.core.padding import pad_left


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=5), st.integers(0, 5))
def test_rows_come_back_right_aligned(rows: list[list[int]], pad_id: int) -> None:
    """Checklist 9. The mask goes by position: a token that equals the padding id counts all the same."""
    ids, mask = pad_left(rows, pad_id)
    width = max([1, *(len(row) for row in rows)])
    assert ids.shape == mask.shape == (len(rows), width)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert ids.tolist() == [[pad_id] * (width - len(row)) + row for row in rows]
    assert mask.tolist() == [[i >= width - len(row) for i in range(width)] for row in rows]


def test_rows_may_be_tuples() -> None:
    ids, mask = pad_left([(4, 5), (6,)], pad_id=9)
    assert ids.tolist() == [[4, 5], [9, 6]]
    assert mask.tolist() == [[True, True], [False, True]]
