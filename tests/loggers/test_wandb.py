"""A run that is gone on with stays one run on the dashboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.loggers.wandb import WandbBoard, earlier_id, without_seed


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


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("seed-3", "default"), ("default", "default"), ("ppo.clip-0.1_seed-2", "ppo.clip-0.1"),
        ("seed-12_x", "x"), ("a_seed-1_b", "a_b"), ("data.seed-3_b", "data.seed-3_b"), ("seed-try", "seed-try"),
    ],
)  # fmt: skip
def test_runs_that_differ_in_their_seed_share_a_group(name: str, group: str) -> None:
    assert without_seed(name) == group


def test_the_runs_of_a_pipeline_have_its_name_and_their_stage(tmp_path: Path) -> None:
    logger = WandbBoard("test", None, str(tmp_path / "mine" / "sft"), offline=True)
    given = logger._wandb_init
    assert (given["name"], given["group"], given["job_type"]) == ("mine", "mine", "sft")
    own = WandbBoard("test", "a", str(tmp_path / "x"), offline=True, group="b", job_type="c")._wandb_init
    assert (own["name"], own["group"], own["job_type"]) == ("a", "b", "c")
