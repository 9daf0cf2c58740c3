"""Named random streams: the same for the same name, and independent of each other and of everything else."""

from __future__ import annotations

import itertools

import torch

from src.utils.seeding import generator, stream_seed


def test_a_stream_has_the_seed_that_runs_before_had() -> None:
    """Another number would change every draw of every run."""
    assert stream_seed(1, "sampling", 0, 7) == 7329399969984989643


def test_every_part_of_the_name_counts() -> None:
    """Also where counters written one after the other would read alike."""
    counters = [(), (1,), (1, 1), (11,), (1, 11), (11, 1), (111,)]
    names = ["sampling", "sampling1", "minibatches"]
    seeds = [stream_seed(s, n, *c) for s, n, c in itertools.product((0, 1, 11), names, counters)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_neither_reads_nor_moves_the_shared_one() -> None:
    before = torch.get_rng_state()
    first = torch.rand(5, generator=generator(3, "x", 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(5, generator=generator(3, "x", 2)), first)
    assert not torch.equal(torch.rand(5, generator=generator(3, "x", 3)), first)
