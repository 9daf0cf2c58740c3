"""Whether a run fits into the memory that is free."""

from __future__ import annotations

import torch

from src.config.schema import PPORun, Sharded
from src.memory.report import estimate_of, readable
from src.utils.check import Check, checked
from src.utils.device import free_memory

TIGHT = 0.9  # of the free memory


def memory(run: PPORun, device: torch.device) -> Check:
    """The estimate of the run's largest memory against what is free on the device. Loads no weights."""
    estimate, free = estimate_of(run), free_memory(device)
    needed = estimate.on_gpu if device.type == "cuda" else estimate.peak
    sharded = isinstance(run.trainer.strategy, Sharded)
    largest = max(estimate.phases, key=lambda phase: estimate.phases[phase])
    return checked(
        "memory",
        f"{readable(needed)} at most, {readable(estimate.lasting)} of them lasting; {readable(free)} free on "
        f"{device.type}. Largest phase: {largest}",
        "smaller ppo.micro_batch_size, rollout.scoring_batch_size or ppo.batch_size, shorter texts, "
        "model.gradient_checkpointing=true, model.dtype=bfloat16; python -m src.plan shows each part",
        fault=needed > free and not sharded,  # which counts the whole model, of which each process keeps a part
        warning=needed > TIGHT * free,
    )
