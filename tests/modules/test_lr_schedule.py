"""Learning rates in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from src.modules.lr_schedule import lr_schedule


def shares(name: str, warmup: int, steps: int) -> list[float]:
    """The share of the peak rate 0.5 that each step has."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = lr_schedule(optimizer, name, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_the_first_step_of_a_warm_up_has_its_share(name: str) -> None:
    """A warm-up of 4 steps: 1/4, 2/4, 3/4, 1. It began at 0, so that the first step changed nothing."""
    assert shares(name, 4, 12)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_rate_falls_to_one_step_before_0() -> None:
    assert shares("linear", 0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert shares("linear", 1, 4) == pytest.approx(shares("linear", 0, 4))  # one step of warm-up is the peak itself
    # after the peak at step 1 the four steps 2 to 5 go down a line that would reach 0 at step 6
    assert shares("linear", 2, 6) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert shares("cosine", 0, 6) == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert shares("constant_with_warmup", 0, 3) == [1.0, 1.0, 1.0]


def test_groups_of_parameters_keep_their_own_peaks() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = SGD(groups)
    lr_schedule(optimizer, "linear", 2, 8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])
