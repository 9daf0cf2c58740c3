"""Cutting a batch into minibatches (one optimizer step each) and micro-batches (one forward pass each)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.types import Experience, Record, Rollout, select
from src.utils.distributed import per_rank_size, round_robin


def minibatches(rows: int, minibatch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random permutation of all rows, cut into pieces of `minibatch_size`; every row is in exactly one."""
    yield from torch.randperm(rows, generator=generator).split(minibatch_size)


def micro_batches(record: Record, size: int) -> Iterator[tuple[Tensor, Record]]:
    """Rows of similar length together, `size` at a time, each trimmed to its own longest prompt and response.

    Yields (index (N,) int64 of the rows, the trimmed record).
    """
    rollout = _rollout(record)
    lengths = rollout.prompt_mask.sum(1) + rollout.response_mask.sum(1)
    for index in lengths.argsort(stable=True).split(size):
        yield index, trim(select(record, index))


def own_micro_batches(record: Record, size: int) -> Iterator[tuple[Tensor, Record]]:
    """This rank's micro-batches, none larger than its share of the rows; all of them in one process.

    Every rank gets equally many; the last of some has no rows of the batch (index (0,)) and one that counts nowhere.
    """
    none = torch.empty(0, dtype=torch.int64, device=_rollout(record).response_mask.device)
    for piece in round_robin(micro_batches(record, per_rank_size(len(_rollout(record).prompts), size))):
        yield piece or (none, uncounted(record))


def uncounted(record: Record) -> Record:
    """The first row, with no token of its response in the mask."""
    row = select(record, torch.zeros(1, dtype=torch.int64, device=_rollout(record).response_mask.device))
    if isinstance(row, Experience):
        return trim(dataclasses.replace(row, rollout=uncounted(row.rollout)))
    return trim(dataclasses.replace(row, response_mask=torch.zeros_like(row.response_mask)))


def trim(record: Record) -> Record:
    """Drop the columns that are padding in every row: prompt columns on the left, response columns on the right."""
    if isinstance(record, Experience):
        rollout = trim(record.rollout)
        width = rollout.response_mask.shape[1]
        columns = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        cut: dict[str, Any] = {k: v[:, :width] for k, v in columns.items() if isinstance(v, Tensor) and v.dim() == 2}
        return dataclasses.replace(record, rollout=rollout, **cut)
    prompt_width = max(1, int(record.prompt_mask.sum(1).max()))
    response_width = max(1, int(record.response_mask.sum(1).max()))
    prompt = record.prompt_ids.shape[1]
    kept = slice(prompt - prompt_width, prompt + response_width)
    return dataclasses.replace(
        record,
        prompt_ids=record.prompt_ids[:, -prompt_width:],
        prompt_mask=record.prompt_mask[:, -prompt_width:],
        response_ids=record.response_ids[:, :response_width],
        response_mask=record.response_mask[:, :response_width],
        behavior_logprobs=record.behavior_logprobs[:, :response_width],
        trunk=None if record.trunk is None else record.trunk[:, kept],
    )


def _rollout(record: Rollout | Experience) -> Rollout:
    return record.rollout if isinstance(record, Experience) else record


def stacked(parts: Iterable[Tensor], fill: float) -> Tensor:
    """The rows of all parts, (N,) or (N, T'), one below the other, padded on the right with `fill`."""
    parts = list(parts)
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def join(pieces: list[tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """Write pieces (index (N,), values (N, T' <= T)) into one (B, T) tensor, 0 where nothing was computed."""
    whole = torch.zeros(shape, dtype=pieces[0][1].dtype, device=pieces[0][1].device)
    for index, values in pieces:
        whole[index, : values.shape[1]] = values
    return whole
