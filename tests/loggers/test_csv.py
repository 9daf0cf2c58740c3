"""The tables of a run: what goes where, what is read back, and what a resumed run makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.loggers.csv import CsvTables, read_table, write_table


def test_numbers_are_read_back_to_the_last_digit(tmp_path: Path) -> None:
    """Steps in order, columns by name, gaps left out."""
    rows = {10: {"b": 1 / 3, "a": 1e-300}, 2: {"c": -0.0, "b": float("inf")}}
    write_table(tmp_path / "deep/metrics.csv", rows)
    assert read_table(tmp_path / "deep/metrics.csv") == rows
    lines = (tmp_path / "deep/metrics.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,a,b,c"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "10"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["metrics.csv"]


def test_without_rows_there_is_no_file(tmp_path: Path) -> None:
    write_table(tmp_path / "metrics.csv", {})
    assert not (tmp_path / "metrics.csv").exists()
    assert read_table(tmp_path / "metrics.csv") == {}


@pytest.mark.parametrize("finish", ["save", "finalize"])
def test_seconds_have_a_table_of_their_own(finish: str, tmp_path: Path) -> None:
    """A row of one step may come in pieces; Lightning's epoch is no number of ours."""
    logger = CsvTables(str(tmp_path))
    logger.log_metrics({"policy/loss": 0.5, "epoch": 0.0, "time/rollout_seconds": 2.0}, 1)
    logger.log_metrics({"rollout/kl": 0.25}, 1)
    logger.log_metrics({"epoch": 0.0}, 2)
    logger.save() if finish == "save" else logger.finalize("success")
    assert read_table(tmp_path / "metrics.csv") == {1: {"policy/loss": 0.5, "rollout/kl": 0.25}}
    assert read_table(tmp_path / "timing.csv") == {1: {"time/rollout_seconds": 2.0}}
    assert (logger.save_dir, logger.name, logger.version) == (str(tmp_path), "csv", "")


def test_what_came_after_a_checkpoint_is_logged_again(tmp_path: Path) -> None:
    """Its rows are a copy, and the files are theirs as soon as they are taken up."""
    logger = CsvTables(str(tmp_path))
    logger.log_metrics({"x": 1.0}, 1)
    state = logger.state_dict()
    logger.log_metrics({"x": 2.0, "y": 3.0}, 1)
    logger.log_metrics({"x": 2.0}, 2)
    logger.save()
    assert state["metrics"] == {1: {"x": 1.0}}
    again = CsvTables(str(tmp_path))
    again.load_state_dict(state)
    assert read_table(tmp_path / "metrics.csv") == {1: {"x": 1.0}}
    again.log_metrics({"x": 5.0}, 2)
    assert state["metrics"] == {1: {"x": 1.0}}
