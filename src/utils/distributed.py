"""Work split over ranks: each computes its part, and all get the same result.

Every function is the identity in a run of one process. An expensive step runs on a shard of the rows or micro-batches,
and its results are gathered; the cheap steps after it run on every rank with the same numbers. So whitening, moments,
baselines and logged means cover all ranks, and their code does not mention ranks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

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


def map_over_ranks(function: Callable[[RowShard], T], rows: int, *, in_step: bool = False) -> list[T]:
    """`function` of each rank's shard, in the order of the rows; a rank without rows does not call it.

    `in_step`: such a rank calls it for the first row and drops the answer, so that all ranks make the same passes.
    """
    mine = row_shard(rows)
    given = [function(mine)] if len(mine.index) else []
    if in_step and not given:
        function(RowShard(torch.arange(1), rows))
    return [answer for own in gather(given) for answer in own]


def per_rank_size(rows: int, size: int) -> int:
    """The size of pieces, at most `size`, small enough that every rank can have one."""
    return max(1, min(size, -(-rows // world_size())))


def round_robin(pieces: Iterable[T]) -> Iterator[T | None]:
    """This rank's pieces when they are assigned in turn; None in a last turn that does not reach this rank.

    So every rank gets equally many: a layer whose weights lie on all ranks needs all of them for each pass.
    """
    for turn in zip_longest(*[iter(pieces)] * world_size()):
        yield turn[rank()]


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

    Sums, not means: each rank's loss is its part of the loss over the whole batch. The gradients of sharded parameters
    have been summed in the backward pass.
    """
    trained = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world_size() == 1 or not trained:
        return
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    found = pieces[0].new_tensor([p.grad is not None for p in trained])
    summed, found = all_reduce_sum(torch.cat([*(piece.flatten() for piece in pieces), found])).split(
        [sum(map(torch.numel, pieces)), len(trained)]
    )
    for parameter, piece, somewhere in zip(trained, summed.split([p.numel() for p in trained]), found, strict=True):
        if somewhere:
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients by the norm of all of them, over all shards; returns the norm before clipping, a scalar."""
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm))


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, any other as it is; every rank must call it.

    The gradient of the result is summed over ranks, and each rank keeps that of its shard.
    """
    if not isinstance(x, DTensor):
        return x
    gathered: Tensor = x.full_tensor(grad_placements=[Partial()])
    return gathered


def sharded_like(x: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, if `parameter` is sharded; does not communicate."""
    if not isinstance(parameter, DTensor) or isinstance(x, DTensor):
        return x
    x = x.to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def broadcast_(parameters: Iterable[nn.Parameter]) -> None:
    """Copy the parameters of rank 0 to every rank."""
    if world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def _here(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage
