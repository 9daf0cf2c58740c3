"""A run that is gone on with stays one run on the dashboard."""

from __future__ import annotations

from pathlib import Path

from src.loggers.wandb import WandbBoard, earlier_id


def test_a_run_folder_keeps_the_id_of_its_first_run(tmp_path: Path) -> None:
    """Checklist 61. Also when the first half was offline and the second is not."""
    assert earlier_id(tmp_path) is None
    for name in ("run-20260103_000000-zzz", "offline-run-20260102_000000-abc", "latest-run"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert earlier_id(tmp_path) == "abc"


def test_an_offline_run_is_gone_on_with_under_its_id(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = WandbBoard("test", None, str(tmp_path), offline=True)
        ids.append(logger.experiment.id)
        logger.experiment.finish()
    assert ids[0] == ids[1] == earlier_id(tmp_path)
