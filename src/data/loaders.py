"""Loaders that resume: batch i is a function of (seed, i), so i is their whole state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from src.errors import DataError, require
from src.utils.seeding import generator

Row = TypeVar("Row")


class StreamLoader(Generic[Row]):
    """`batches` batches of rows over repeated passes, each pass in a new order drawn from the seed.

    It has a length, so Lightning does not prefetch, and a `state_dict`, so Lightning saves its cursor.
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
            raise DataError(f"there are no rows for {stream}")
        self.rows, self.collate, self.batch_size, self.batches = rows, collate, batch_size, batches
        self.seed, self.stream = seed, stream
        self.cursor = 0
        self.changed = False  # whether the rows differ from those of the loaded state
        self._order_of_pass = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.cursor >= self.batches:
            self.cursor = 0
        while self.cursor < self.batches:
            self.cursor += 1
            yield self._batch(self.cursor - 1)

    def peek(self) -> dict[str, Any] | None:
        """The batch that comes next, which it stays; None after the last one."""
        return self._batch(self.cursor) if self.cursor < self.batches else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the batch size, in which the cursor counts, and of all rows in order."""
        digest = hashlib.sha256(str(self.batch_size).encode())
        for row in self.rows:
            digest.update(f"{row!r}\n".encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The number of batches returned, and the fingerprint of the rows."""
        return {"cursor": self.cursor, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the returned batches; with other rows start from the first batch."""
        self.changed = state["fingerprint"] != self.fingerprint
        self.cursor = 0 if self.changed else state["cursor"]

    def _batch(self, number: int) -> dict[str, Any]:
        indices = [self._row_at(number * self.batch_size + i) for i in range(self.batch_size)]
        return self.collate([self.rows[i] for i in indices], indices)

    def _row_at(self, place: int) -> int:
        number, offset = divmod(place, len(self.rows))
        if self._order_of_pass[0] != number:
            order = torch.randperm(len(self.rows), generator=generator(self.seed, self.stream, number))
            self._order_of_pass = number, order
        return int(self._order_of_pass[1][offset])


class OrderedLoader(Generic[Row]):
    """Every row once, in order, for validation and test."""

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
