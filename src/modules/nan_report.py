"""The samples of a step that was not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.models.roles import Roles
from src.rollout.minibatches import join, micro_batches
from src.types import Experience, Rollout
from src.utils.nonfinite import json_number


@torch.no_grad()
def nan_report(roles: Roles, minibatch: Experience, size: int) -> list[dict[str, Any]]:
    """Texts, score and advantages of each row, and names of its numbers that are not finite under the present weights.

    Policy and critic (if any) run again, `size` rows at a time. `not_finite` is empty in every row when the backward
    pass or the sum over the rows was not finite.
    """
    outputs: dict[str, Callable[[Rollout], Tensor]] = {
        "logprobs": lambda micro: roles.distribution(micro, 1.0).logprobs()
    }
    if roles.value_head is not None:
        outputs["values"] = roles.values
    rollout = minibatch.rollout
    found: dict[str, Tensor | None] = {
        name: getattr(minibatch, name) for name in ("old_logprobs", "old_values", "rewards", "advantages", "returns")
    }
    for name, output in outputs.items():
        pieces = [(index, output(micro)) for index, micro in micro_batches(rollout, size)]
        found[name] = join(pieces, minibatch.mask.shape)
    return [
        {
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": json_number(minibatch.scores[row].item()),
            "advantages": summary(minibatch.advantages[row][minibatch.mask[row]]),
            "not_finite": [name for name, x in found.items() if x is not None and not x[row].isfinite().all()],
        }
        for row in range(len(minibatch))
    ]


def summary(x: Tensor) -> dict[str, float | str]:
    """Mean, minimum and maximum as JSON numbers; empty for no numbers."""
    of = {"mean": Tensor.mean, "min": Tensor.min, "max": Tensor.max}
    return {name: json_number(function(x).item()) for name, function in of.items()} if len(x) else {}
