"""The order of a run's callbacks."""

from __future__ import annotations

from pathlib import Path

from src.callbacks.alarms import Alarms
from src.callbacks.held_out import HeldOut
from src.callbacks.samples import SampleTable
from src.checkpointing.checkpoint import IterationCheckpoint
from src.checkpointing.graceful_stop import GracefulStop
from src.config.compose import compose
from src.stages.builders import stage_of


def test_the_checkpoint_comes_last_but_for_the_graceful_stop(tmp_path: Path) -> None:
    """A checkpoint that is written before another callback has run lacks what that one logs or changes."""
    own = "+callbacks.mine={_target_:lightning.pytorch.callbacks.Timer}"
    callbacks = stage_of(compose(["early_stop=gold", own])).callbacks(tmp_path)
    assert [type(callback) for callback in callbacks[-2:]] == [IterationCheckpoint, GracefulStop]


def test_what_ends_a_training_comes_before_what_keeps_its_best_policy(tmp_path: Path) -> None:
    """Or a run that an alarm ends would not end with its best policy."""
    kinds = [type(callback) for callback in stage_of(compose(["ppo.held_out.every=5"])).callbacks(tmp_path)]
    assert kinds.index(Alarms) < kinds.index(HeldOut) < kinds.index(SampleTable)
