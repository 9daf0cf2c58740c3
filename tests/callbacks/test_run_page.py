"""The page while the run trains: when it is written, and that it never ends the run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.callbacks import run_page
from src.callbacks.run_page import RunPage
from src.loggers.csv import CsvTables


def trainer(folder: Path, main: bool = True) -> Any:
    logger = CsvTables(str(folder))
    logger.log_metrics({"rollout/score": 0.5}, 1)
    return SimpleNamespace(loggers=[logger], is_global_zero=main)


def go(page: RunPage, trainer: Any, iterations: int) -> None:
    for done in range(iterations):
        page.on_train_batch_end(trainer, SimpleNamespace(), None, None, done)  # type: ignore[arg-type]


def test_it_is_due_every_so_many_iterations_and_every_three_minutes_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 25))  # seconds of each look at it
    monkeypatch.setattr(run_page.time, "monotonic", lambda: float(next(clock)))
    written: list[int] = []
    monkeypatch.setattr(run_page, "write_page", lambda folder: written.append(next(clock)))
    go(RunPage(str(tmp_path), every=2), trainer(tmp_path), 48)
    assert len(written) >= 2
    assert all(later - earlier > 180 for earlier, later in pairwise(written))


def test_the_page_has_what_was_logged_so_far_when_the_run_is_cut_short(tmp_path: Path) -> None:
    RunPage(str(tmp_path), every=5).on_exception(trainer(tmp_path), SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not finished, 1 iterations" in text
    assert "rollout/score" in text


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(run_page, "write_page", full)
    RunPage(str(tmp_path), every=1).on_exception(trainer(tmp_path), SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    assert caplog.messages == ["report.html could not be written (No space left on device); the run is not affected"]


def test_one_rank_writes_and_only_into_a_folder_that_is_there(tmp_path: Path) -> None:
    for folder, main in ((tmp_path, False), (tmp_path / "none", True)):
        page = RunPage(str(folder), every=1)
        page.on_exception(trainer(tmp_path, main), SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
        assert not (folder / "report.html").exists()
