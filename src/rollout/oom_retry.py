"""Passes over as many rows as fit into memory: the number is halved when it runs out, with the same result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from torch import Tensor

from src.errors import ModelError
from src.rollout.minibatches import own_micro_batches, trim
from src.types import Record, select
from src.utils.out_of_memory import out_of_memory

T = TypeVar("T")


class OomRetry:
    """Rows per pass on this rank: `size` (the setting `key`), halved each time that memory runs out.

    The work that ran out of memory is repeated from its start with smaller pieces. No gradient is copied in case a
    backward pass ends half-way: the gradient of a minibatch starts at 0 and is set back to 0. Pieces are cut inside
    a rank's share of the rows, so the other ranks need not know; with sharded layers they would have to.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size, self.given, self.key = size, size, key
        self.alone = True  # False: other ranks wait in the same pass, so it cannot be repeated here

    def micro_batches(self, record: Record) -> Iterator[tuple[Tensor, Record]]:
        """This rank's micro-batches (`own_micro_batches`), cut to what fits."""
        for index, micro in own_micro_batches(record, self.given):
            if len(index) <= self.size:
                yield index, micro
                continue
            for rows in torch.arange(len(index), device=index.device).split(self.size):
                yield index[rows], trim(select(micro, rows))

    def attempt(self, work: Callable[[], T], rows: int, undo: Callable[[], object] = lambda: None) -> T:
        """`work()`; when memory runs out, `undo()` and repeat with smaller pieces. `rows`: of all pieces together.

        Raises `ModelError` when a single row does not fit, or when the layers are sharded.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._halve(rows, error)
            undo()  # outside of the except block, which keeps the tensors of the failed pass alive
            garbage_collection_cuda()

    def _halve(self, rows: int, error: RuntimeError) -> None:
        used = min(self.size, rows)
        if not self.alone:
            raise ModelError(
                f"out of memory: with trainer=fsdp all processes make each pass together, so it is not repeated with "
                f"fewer rows: set {self.key} below {used}; the last checkpoint is kept"
            ) from error
        if used == 1:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"memory does not suffice for a single sequence: model.gradient_checkpointing=true, a smaller "
                f"rollout.max_new_tokens or rollout.max_prompt_tokens, or a smaller model takes less ({reason})"
            ) from error
        self.size = used // 2
        warnings.warn(
            f"out of memory: passes now take {self.size} sequences instead of {used}, for the rest of this run; the "
            f"result is the same. {self.key}={self.size} avoids this",
            stacklevel=3,
        )
