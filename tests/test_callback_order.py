"""The order in which a run's callbacks are asked."""

from __future__ import annotations

from pathlib import Path

from src.checkpointing.checkpoint import IterationCheckpoint
from src.checkpointing.graceful_stop import GracefulStop
from src.config.compose import compose
from src.train import _trainer


def test_the_checkpoint_comes_last_but_for_the_orderly_end(tmp_path: Path) -> None:
    """A checkpoint that is written before another callback has had its say lacks what that one logs or changes."""
    config = compose(["early_stop=gold"])
    config.run_dir = str(tmp_path)
    callbacks = _trainer(config).callbacks
    assert [type(callback) for callback in callbacks[-2:]] == [IterationCheckpoint, GracefulStop]
