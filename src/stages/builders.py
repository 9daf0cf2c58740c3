"""The builder of each stage."""

from __future__ import annotations

from typing import Any

from src.config.schema import PPORun, RewardRun, Run, SFTRun
from src.stages.base import Stage
from src.stages.ppo import PPOStage
from src.stages.reward import RewardStage
from src.stages.sft import SFTStage

BUILDERS: dict[type[Run], type[Stage[Any]]] = {SFTRun: SFTStage, RewardRun: RewardStage, PPORun: PPOStage}


def stage_of(run: Run) -> Stage[Any]:
    """The builder of the run's stage."""
    return next(builder(run) for kind, builder in BUILDERS.items() if isinstance(run, kind))
