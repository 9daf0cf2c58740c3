"""A resumable loader: batch i is a function of (seed, i) alone, so the only thing to remember is i."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from src.core.checks import require
from src.utils.streams import generator

Row = TypeVar("Row")


class StreamLoader(Generic[Row]):
    """`batches` batches of rows, pass after pass over the data, each pass in a fresh order drawn from the seed.

    It is sized, so Lightning does not fetch ahead, and has `state_dict`, so Lightning saves its cursor.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[list[Row], list[int]], dict[str, Any]],
        *,
        batch_size: int,
        batches: int,
        seed: int,
        stream: str,
    ) -> None:
        require(1 <= batch_size, "batch_size", batch_size, "at least 1")
        if not rows:
            raise ValueError(f"there are no rows for {stream}")
        self.rows, self.collate, self.batch_size, self.batches = rows, collate, batch_size, batches
        self.seed, self.stream = seed, stream
        self.cursor = 0
        self._order_of_pass = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.cursor >= self.batches:
            self.cursor = 0
        while self.cursor < self.batches:
            indices = [self._row_at(self.cursor * self.batch_size + i) for i in range(self.batch_size)]
            self.cursor += 1
            yield self.collate([self.rows[i] for i in indices], indices)

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were handed out."""
        self.cursor = state["cursor"]

    def _row_at(self, place: int) -> int:
        number, offset = divmod(place, len(self.rows))
        if self._order_of_pass[0] != number:
            order = torch.randperm(len(self.rows), generator=generator(self.seed, self.stream, number))
            self._order_of_pass = number, order
        return int(self._order_of_pass[1][offset])


class OrderedLoader(Generic[Row]):
    """Every row once, in order: for validation and test."""

    def __init__(
        self, rows: Sequence[Row], collate: Callable[[list[Row], list[int]], dict[str, Any]], batch_size: int
    ) -> None:
        require(1 <= batch_size, "batch_size", batch_size, "at least 1")
        self.rows, self.collate, self.batch_size = rows, collate, batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.rows), self.batch_size):
            indices = list(range(start, min(start + self.batch_size, len(self.rows))))
            yield self.collate([self.rows[i] for i in indices], indices)
