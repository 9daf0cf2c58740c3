"""The order of a run's callbacks."""

from __future__ import annotations

from pathlib import Path

from src.checkpointing.checkpoint import IterationCheckpoint
from src.checkpointing.graceful_stop import GracefulStop
from src.config.compose import compose
from src.stages.builders import stage_of


def test_the_checkpoint_comes_last_but_for_the_graceful_stop(tmp_path: Path) -> None:
    """A checkpoint that is written before another callback has run lacks what that one logs or changes."""
    own = "+callbacks.mine={_target_:lightning.pytorch.callbacks.Timer}"
    callbacks = stage_of(compose(["early_stop=gold", own])).callbacks(tmp_path)
    assert [type(callback) for callback in callbacks[-2:]] == [IterationCheckpoint, GracefulStop]
