"""The configuration's types and ranges: one small model for each option, none of which loads torch.

A stage reads `SFTRun`, `RewardRun` or `PPORun`. Options of the groups below `ppo`, `reward_model` and the like add keys
of their own: `run_type` joins the models of the chosen options, so that a key no chosen option declares is refused.
The meaning of a key is the comment next to it in `conf/`.
"""

from __future__ import annotations

from src.config.schema.algorithm import Critic
from src.config.schema.model import Lora, Model
from src.config.schema.names import (
    KL_LOST,
    KL_UNEVEN,
    MEANT,
    NOT_OF_TRAINER,
    OPEN,
    PLAIN,
    QUOTES,
    UNEVEN,
    WHY_NOT,
)
from src.config.schema.nodes import Node, Target, Typed
from src.config.schema.options import OPTIONS, OWN, run_type
from src.config.schema.stages import (
    PPO,
    RUNS,
    SFT,
    Callbacks,
    Checkpoint,
    Loggers,
    Nonfinite,
    Optimization,
    PPORun,
    RewardModel,
    RewardRun,
    Rollout,
    Run,
    SFTRun,
    Stop,
)
from src.config.schema.trainer import Sharded, Trainer

__all__ = [
    "KL_LOST",
    "KL_UNEVEN",
    "MEANT",
    "NOT_OF_TRAINER",
    "OPEN",
    "OPTIONS",
    "OWN",
    "PLAIN",
    "PPO",
    "QUOTES",
    "RUNS",
    "SFT",
    "UNEVEN",
    "WHY_NOT",
    "Callbacks",
    "Checkpoint",
    "Critic",
    "Loggers",
    "Lora",
    "Model",
    "Node",
    "Nonfinite",
    "Optimization",
    "PPORun",
    "RewardModel",
    "RewardRun",
    "Rollout",
    "Run",
    "SFTRun",
    "Sharded",
    "Stop",
    "Target",
    "Trainer",
    "Typed",
    "run_type",
]
