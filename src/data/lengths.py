"""Rows that are longer than the tokens they may have."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


def cut_rows(rows: str, lengths: list[int], limit: int, part: str) -> str:
    """How many `rows` of these lengths lose their beginning or end (`part`) to the limit, as a sentence."""
    cut = sum(length > limit for length in lengths)
    return (
        f"{cut} of {len(lengths)} {rows} are longer than {limit} tokens and lose their {part}; the longest has "
        f"{max(lengths)}"
    )


def say_cut(rows: str, lengths: list[int], limit: int, part: str) -> None:
    """Say so on rank 0 if any does."""
    if max(lengths) > limit:
        rank_zero_only(log.info)(cut_rows(rows, lengths, limit, part))
