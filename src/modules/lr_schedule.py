"""Learning rates over the steps of a stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def lr_schedule(optimizer: Optimizer, name: str, warmup: int, steps: int) -> LambdaLR:
    """The schedule `name` of transformers, one step on: no step has rate 0.

    Step i < `warmup`, counted from 0, has the share (i + 1) / warmup of the peak rate; the last of `steps` is the last
    before 0.
    """
    shares = get_scheduler(name, optimizer, num_warmup_steps=max(warmup, 1), num_training_steps=steps + 1).lr_lambdas
    return LambdaLR(optimizer, [partial(_next, share) for share in shares])


def _next(share: Callable[[int], float], i: int) -> float:
    return share(i + 1)
