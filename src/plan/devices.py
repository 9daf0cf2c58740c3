"""What one of N devices must hold under each strategy, from the memory estimate of the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from src.config.schema import PPORun
from src.config.schema.engines import VLLMTarget
from src.memory.estimate import BASE, LOADING, PREPACKED, SAVING, MemoryEstimate
from src.memory.report import estimate_of
from src.plan.iteration import Ranks
from src.plan.work import Shape

RESERVE = 0.9  # of a device; the rest is for the driver, the allocator and the libraries
GB = 10**9


@dataclass(frozen=True)
class OnDevice:
    """Bytes on the fullest device, and the phase that takes them."""

    ranks: Ranks
    bytes: float
    phase: str

    def fits(self, gigabytes: float) -> bool:
        """Whether it fits into so many 10^9 bytes, with a reserve."""
        return self.bytes <= RESERVE * GB * gigabytes


def on_device(run: PPORun, shape: Shape, ranks: Ranks) -> OnDevice:
    """The most bytes at once on a device of a GPU run, its share of the rows at a time.

    Sharded, a rank holds its shard of weights, gradients and optimizer states; to learn and score also one layer and
    the vocabulary head, to sample one whole model (docs/distributed.md). A learned reward is whole on each. An engine
    of others holds merged weights and a cache: in the process while it samples, on servers never on these devices.
    """
    found = estimate_of(run, ranks.count)
    in_main_memory = (SAVING, LOADING)
    phases: dict[str, float] = {name: size for name, size in found.phases.items() if name not in in_main_memory}
    sampling = next(phase for phase in phases if phase.startswith("rollout"))
    if isinstance(run.rollout.engine, VLLMTarget):
        served = found.phases[SAVING]  # a plain model, also where the base here is quantized
        phases[sampling] = served + run.rollout.engine.cache_gb * GB
    if run.choices["engine"] == "vllm_server":
        del phases[sampling]
    lasting = found.lasting - found.weights.get(PREPACKED, 0)
    totals = {phase: lasting + size for phase, size in phases.items()}
    if ranks.sharded:
        totals = {phase: _sharded(found, shape, phase, size, ranks) for phase, size in phases.items()}
    phase = max(totals, key=lambda name: totals[name])
    return OnDevice(ranks, totals[phase], phase.partition(":")[0])


def _sharded(found: MemoryEstimate, shape: Shape, phase: str, temporary: float, ranks: Ranks) -> float:
    """Bytes of a phase on one of the ranks."""
    reward = found.weights.get("reward", 0)
    held = (found.lasting - reward - found.weights.get(PREPACKED, 0)) / ranks.count + reward
    gradients = next((size for role, size in found.gradients.items() if phase.startswith(f"update of the {role}")), 0)
    gathered = found.weights[BASE] if phase.startswith("rollout") else shape.size * (shape.of_layer + shape.of_head)
    return held + gathered + temporary - gradients * ranks.others
