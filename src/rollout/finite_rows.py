"""The models' outputs for a rollout, and the rows whose numbers are all finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from src.errors import NonFiniteError
from src.rollout.scoring import Scored
from src.utils.nonfinite import FiniteGuard, json_number


@dataclass(frozen=True, kw_only=True)
class ModelOutputs:
    """Outputs of the roles for a rollout; all (B, T) and 0 outside the mask."""

    logprobs: Tensor  # nats, of the policy
    ref_logprobs: Tensor | None  # nats, of the reference; None when it does not run
    kl: Tensor  # nats, policy || reference by the chosen estimator; 0 without a reference
    values: Tensor | None  # of the critic; None without one

    def only(self, kept: Tensor) -> ModelOutputs:
        """The rows `kept`, (K,) int64."""
        ref_logprobs = None if self.ref_logprobs is None else self.ref_logprobs[kept]
        values = None if self.values is None else self.values[kept]
        logprobs, kl = self.logprobs[kept], self.kl[kept]
        return ModelOutputs(logprobs=logprobs, ref_logprobs=ref_logprobs, kl=kl, values=values)


def keep_finite(
    scored: Scored, outputs: ModelOutputs, nonfinite: FiniteGuard, iteration: int
) -> tuple[Scored, ModelOutputs]:
    """Drop the rows that hold a number which is not finite, before it reaches a mean over the batch.

    Raises `NonFiniteError` at the limit of `nonfinite`, and when no row is left.
    """
    rollout = scored.rollout
    seen = {"behavior_logprobs": rollout.behavior_logprobs}
    seen |= {f.name: getattr(outputs, f.name) for f in fields(outputs)}
    broken = {name: ~x.isfinite().all(1) for name, x in seen.items() if x is not None}
    rows = torch.stack(list(broken.values())).any(0)

    def described() -> list[dict[str, Any]]:
        return [
            {
                "prompt": rollout.prompts[row],
                "response": rollout.responses[row],
                "score": json_number(scored.scores[row].item()),
                "not_finite": [name for name, found in broken.items() if found[row]],
            }
            for row in rows.nonzero().flatten().tolist()
        ]

    first = next(iter(rows.nonzero().flatten().tolist()), None)
    numbers = {} if first is None else {f"the logprobs or values of a response to {rollout.prompts[first]!r}": math.nan}
    if nonfinite.passes("experience", iteration, numbers, described):
        return scored, outputs
    if rows.all():
        raise NonFiniteError(
            f"iteration {iteration}: no response has finite logprobs: the weights or the base are broken"
        )
    kept = (~rows).nonzero().flatten()
    return scored.only(kept), outputs.only(kept)
