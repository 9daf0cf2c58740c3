"""Passes over as many rows as fit into memory: halved when they do not, with the same result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from src.errors import ModelError
from src.rollout.minibatches import own_micro_batches, trim
from src.types import Record, select

T = TypeVar("T")


class OomRetry:
    """How many rows a pass takes on this rank: `size`, given as `key`, until memory runs out; then half, and so on.

    What was begun when memory ran out is done again from its start with smaller pieces. So nothing has to be copied
    beforehand for the case that a backward pass ends half-way: the gradient of a minibatch starts at 0, and to 0 it
    returns. Pieces are cut inside a rank's own share, so the other ranks need not know.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size, self.given, self.key = size, size, key

    def micro_batches(self, record: Record) -> Iterator[tuple[Tensor, Record]]:
        """This rank's micro-batches, as `own_micro_batches` deals them out, cut to what fits."""
        for index, micro in own_micro_batches(record, self.given):
            if len(index) <= self.size:
                yield index, micro
                continue
            for rows in torch.arange(len(index), device=index.device).split(self.size):
                yield index[rows], trim(select(micro, rows))

    def attempt(self, work: Callable[[], T], rows: int, undo: Callable[[], object] = lambda: None) -> T:
        """`work()`, again after `undo()` with smaller pieces each time that memory runs out; `rows`: in all its pieces.

        Raises `ModelError` when a single row does not fit.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._halve(rows, error)
            undo()  # outside of the except block, which holds on to the tensors of the pass that failed
            garbage_collection_cuda()

    def _halve(self, rows: int, error: RuntimeError) -> None:
        used = min(self.size, rows)
        if used == 1:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"memory does not suffice for a single sequence: model.gradient_checkpointing=true, a smaller "
                f"rollout.max_new_tokens or rollout.max_prompt_tokens, or a smaller model takes less ({said})"
            ) from error
        self.size = used // 2
        warnings.warn(
            f"out of memory: passes now take {self.size} sequences instead of {used}, for the rest of this run; the "
            f"result is the same. {self.key}={self.size} says so from the start",
            stacklevel=3,
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the machine is used up."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)
