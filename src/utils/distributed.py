"""Work split over ranks: each computes its part, and all get the same result.

Every function is the identity in a run of one process. An expensive step runs on a shard of the rows or micro-batches,
and its results are gathered; the cheap steps after it run on every rank with the same numbers. So whitening, moments,
baselines and logged means cover all ranks, and their code does not mention ranks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class RowShard:
    """The rows `index` (N,) int64 of a batch of `rows`."""

    index: Tensor
    rows: int


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def row_shard(rows: int) -> RowShard:
    """This rank's rows of a batch: a contiguous block, which may be empty with more ranks than rows."""
    return RowShard(torch.arange(rows).tensor_split(world_size())[rank()], rows)


def map_over_ranks(function: Callable[[RowShard], T], rows: int) -> list[T]:
    """`function` of each rank's shard, in the order of the rows; a rank without rows does not call it."""
    mine = row_shard(rows)
    return [answer for own in gather([function(mine)] if len(mine.index) else []) for answer in own]


def per_rank_size(rows: int, size: int) -> int:
    """The size of pieces, at most `size`, small enough that every rank can have one."""
    return max(1, min(size, -(-rows // world_size())))


def round_robin(pieces: Iterable[T]) -> Iterator[T]:
    """This rank's pieces when they are assigned in turn."""
    return islice(pieces, rank(), None, world_size())


def gather(x: T) -> list[T]:
    """The objects of all ranks, in the order of ranks, with tensors on this rank's device."""
    if world_size() == 1:
        return [x]
    brought = io.BytesIO()
    torch.save(x, brought)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, brought.getvalue())
    return [torch.load(io.BytesIO(part), map_location=_here, weights_only=False) for part in parts]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over ranks, the same bits on each."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over ranks; a gradient that no rank has stays None.

    Sums, not means: each rank's loss is its part of the loss over the whole batch.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    found = pieces[0].new_tensor([p.grad is not None for p in trained])
    summed, found = all_reduce_sum(torch.cat([*(piece.flatten() for piece in pieces), found])).split(
        [sum(map(torch.numel, pieces)), len(trained)]
    )
    for parameter, piece, somewhere in zip(trained, summed.split([p.numel() for p in trained]), found, strict=True):
        if somewhere:
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)


@torch.no_grad()
def broadcast_(parameters: Iterable[nn.Parameter]) -> None:
    """Copy the parameters of rank 0 to every rank."""
    if world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def _here(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage
