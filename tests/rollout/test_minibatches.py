"""Cutting a batch: every row once, in a fresh order, and nothing lost by trimming."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from src.rollout.minibatches import join, micro_batches, minibatches, own_micro_batches, trim
from src.types import select
from src.utils import distributed
from tests.tiny import ragged_experience, ragged_rollout


@pytest.mark.parametrize(("rows", "size"), [(8, 4), (8, 3), (7, 7), (5, 1)])
def test_minibatches_hold_every_row_once(rows: int, size: int) -> None:
    """Checklist 52."""
    pieces = [index.tolist() for index in minibatches(rows, size, torch.Generator().manual_seed(1))]
    assert sorted(row for piece in pieces for row in piece) == list(range(rows))
    assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert 0 < len(pieces[-1]) <= size


def test_another_generator_gives_another_permutation() -> None:
    """Checklist 52."""
    orders = [
        tuple(torch.cat(list(minibatches(20, 4, torch.Generator().manual_seed(seed)))).tolist()) for seed in (1, 2, 1)
    ]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != tuple(range(20))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_hold_every_counted_element_and_no_empty_column(size: int) -> None:
    """Checklist 47, 11."""
    rollout = ragged_rollout(rows=9, prompt=6, response=7)
    experience = ragged_experience(rollout, torch.randn(9, 7), torch.randn(9, 7))
    seen: list[int] = []
    for index, micro in micro_batches(experience, size):
        assert len(micro) == len(index) <= size
        assert micro.rollout.prompt_mask.any(0).all()
        assert micro.mask.any(0).all()
        for place, row in enumerate(index.tolist()):
            seen.append(row)
            for name in ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns"):
                mine, whole = getattr(micro, name), getattr(experience, name)
                assert mine[place][micro.mask[place]].tolist() == whole[row][experience.mask[row]].tolist()
            for ids, mask in (("prompt_ids", "prompt_mask"), ("response_ids", "response_mask")):
                mine = getattr(micro.rollout, ids)[place][getattr(micro.rollout, mask)[place]]
                assert torch.equal(mine, getattr(rollout, ids)[row][getattr(rollout, mask)[row]])
            assert micro.scores[place] == experience.scores[row]
            assert micro.rollout.prompts[place] == rollout.prompts[row]
    assert sorted(seen) == list(range(9))


def test_trimming_leaves_no_tensor_behind() -> None:
    """Checklist 47. All (B, P) and all (B, T) tensors keep equal widths."""
    rollout = ragged_rollout(rows=4, prompt=6, response=7)
    short = trim(select(ragged_experience(rollout, torch.randn(4, 7), torch.randn(4, 7)), torch.tensor([1])))

    def widths(record: object) -> set[tuple[str, int]]:
        tensors = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}  # type: ignore[arg-type]
        return {
            ("P" if "prompt" in n else "T", v.shape[1])
            for n, v in tensors.items()
            if isinstance(v, Tensor) and v.dim() == 2
        }

    assert len(widths(short.rollout)) == 2
    assert widths(short) == {("T", short.mask.shape[1])}
    assert short.mask.shape[1] == int(rollout.response_mask[1].sum())


def test_pieces_come_back_in_their_rows() -> None:
    """Checklist 3."""
    whole = torch.arange(12.0).view(4, 3) + 1
    whole[0, 2] = whole[2, 1:] = 0
    pieces = [(torch.tensor([2, 0]), whole[[2, 0], :2]), (torch.tensor([3, 1]), whole[[3, 1]])]
    assert torch.equal(join(pieces, whole.shape), whole)


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_ranks_have_equally_many_micro_batches(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is in one; what fills up counts no token and writes nowhere."""
    rollout = ragged_rollout(rows=rows)
    logprobs = rollout.response_mask * 1.0
    experience = ragged_experience(rollout, logprobs, logprobs)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    counts, seen, places = set(), [], torch.zeros(rollout.response_mask.shape)
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        own = list(own_micro_batches(experience, 2))
        counts.add(len(own))
        seen += [row for index, _ in own for row in index.tolist()]
        assert all(len(index) or not micro.mask.any() for index, micro in own)
        assert sum(int(micro.mask.sum()) for _, micro in own) == sum(
            int(rollout.response_mask[i].sum()) for i, _ in own
        )
        places += join([(index, micro.mask.float()) for index, micro in own], rollout.response_mask.shape)
    assert len(counts) == 1
    assert sorted(seen) == list(range(rows))
    assert torch.equal(places, rollout.response_mask.float())
