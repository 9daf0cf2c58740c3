"""Work split over ranks: nothing is done twice or left out, and one process is as if there were no ranks.

tests/test_ddp.py does the same in two processes.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from src.utils import distributed
from src.utils.distributed import (
    all_reduce_sum,
    broadcast_,
    clip_gradients,
    gather,
    map_over_ranks,
    per_rank_size,
    round_robin,
    row_shard,
    sharded_like,
    sum_gradients,
    whole,
)


def test_one_process_does_everything_itself() -> None:
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    sum_gradients(layer.parameters())
    broadcast_(layer.parameters())
    assert all(torch.equal(p.grad, old) for p, old in zip(layer.parameters(), before, strict=True))
    x = torch.ones(3)
    assert all_reduce_sum(x) is x
    assert gather("x") == ["x"]
    assert list(round_robin("abc")) == ["a", "b", "c"]
    assert map_over_ranks(lambda shard: shard.index.tolist(), 4) == [[0, 1, 2, 3]]
    assert map_over_ranks(lambda shard: shard.index.tolist(), 0) == []
    assert whole(x) is x
    assert sharded_like(x, layer.weight) is x
    assert clip_gradients(layer.parameters(), 0.5) == pytest.approx(3**0.5)  # of the gradient (1, 1), 1
    assert sum(p.grad.square().sum() for p in layer.parameters()) == pytest.approx(0.25, rel=1e-4)
    assert [per_rank_size(rows, 8) for rows in (0, 3, 8, 20)] == [1, 3, 8, 8]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_ranks_can_make_equally_many_passes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without rows calls the function for the first, and says nothing."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "gather", lambda given: [given])
    for number in range(3):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        calls: list[list[int]] = []
        answers = map_over_ranks(lambda shard, calls=calls: calls.append(shard.index.tolist()), rows, in_step=True)
        assert calls == [[number if number < rows else 0]]
        assert len(answers) == (number < rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 4, 7, 10])
def test_every_row_and_piece_falls_to_one_rank(ranks: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in blocks that differ by one row at most; pieces of at most 4 rows in turn."""
    shards, dealt = [], []
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    size = per_rank_size(rows, 4)
    for number in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        shard = row_shard(rows)
        assert shard.rows == rows
        shards.append(shard.index.tolist())
        dealt.append(list(round_robin(range(0, rows, size))))
    assert len({len(own) for own in dealt}) == 1  # equally many passes
    dealt = [[piece for piece in own if piece is not None] for own in dealt]
    assert [row for shard in shards for row in shard] == list(range(rows))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert sorted(piece for own in dealt for piece in own) == list(range(0, rows, size))
    assert max(map(len, dealt)) <= 1 or rows > 4 * ranks  # one pass each where the rows fit into one
