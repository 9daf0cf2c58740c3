"""Rows of different length as one rectangle and a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from src.core.shapes import Ids, Mask


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Ids, Mask]:
    """Right-align rows of token ids. Result: ids (B, S) int64 and mask (B, S) bool, S the longest row (at least 1)."""
    width = max([1, *map(len, rows)])
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = True
    return ids, mask
