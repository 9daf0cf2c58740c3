"""Lightning's Trainer, and the strategies by which several processes train."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from src.config.schema.nodes import Count, Node, Target


class Trainer(Node):
    """Lightning's Trainer; further arguments are its own."""

    model_config = ConfigDict(extra="allow")

    accelerator: str
    devices: Count
    precision: Literal["32-true", "bf16-mixed"]

    num_nodes: ClassVar[int] = 1
    strategy: ClassVar[Target | None] = None


class Summed(Target):
    """The strategy by which several processes train, each with a whole model."""

    path_of_target: Literal["src.utils.launch.SummedGradients"] = Field(alias="_target_")


class Sharded(Target):
    """The strategy that shards the trained model."""

    path_of_target: Literal["src.modules.sharded_strategy.ShardedLayers"] = Field(alias="_target_")


class Ddp(Node):
    """trainer=ddp."""

    num_nodes: Count
    strategy: Summed


class Fsdp(Node):
    """trainer=fsdp."""

    num_nodes: Count
    strategy: Sharded
