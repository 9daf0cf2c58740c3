"""The picture of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from src.callbacks.curves import PANELS, Curves, draw
from src.loggers.csv import CsvTables


def trainer(logger: CsvTables, main: bool = True) -> Any:
    return SimpleNamespace(loggers=[logger], is_global_zero=main)


@pytest.mark.parametrize(("main", "rows", "drawn"), [(True, 3, True), (True, 0, False), (False, 3, False)])
def test_it_is_drawn_once_from_the_rows_there_are(main: bool, rows: int, drawn: bool, tmp_path: Path) -> None:
    logger = CsvTables(str(tmp_path))
    for step in range(1, rows + 1):
        logger.log_metrics({"rollout/score": 0.1 * step}, step)
    Curves(str(tmp_path)).on_fit_end(trainer(logger, main), SimpleNamespace())  # type: ignore[arg-type]
    assert (tmp_path / "curves.png").exists() == drawn
    if drawn:
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_line_has_the_points_that_were_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of iterations; a column that some iterations lack has fewer, one that all lack is no line."""
    shown: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    rows = {3: {"rollout/score": 0.3, "rollout/kl": 1.0}, 1: {"rollout/score": 0.1, "rollout/gold": 0.2}}
    draw(rows, tmp_path / "curves.png")
    (figure,) = shown
    lines = {line.get_label(): line.get_xydata().tolist() for axis in figure.axes for line in axis.lines}
    assert lines == {
        "rollout/score": [[1, 0.1], [3, 0.3]], "rollout/gold": [[1, 0.2]], "rollout/kl": [[3, 1.0]],
    }  # fmt: skip
    assert [axis.get_title() for axis in figure.axes] == list(PANELS)
    assert figure.get_suptitle() == f"3 PPO iterations of {tmp_path.name}"
    for axis in figure.axes:
        assert axis.get_xlabel() == "PPO iteration"
        assert axis.get_ylabel()
        assert all(tick == round(tick) for tick in axis.get_xticks())


def test_the_score_has_the_interval_of_its_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 responses with a deviation of 0.8: 1.96 * 0.8 / 8."""
    shown: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    row = {"rollout/score": 1.0, "rollout/score_std": 0.8, "train/episodes": 128.0, "train/iterations": 2.0}
    draw({2: row, 4: row | {"train/episodes": 256.0, "train/iterations": 4.0}}, tmp_path / "curves.png")
    (band,) = shown[0].axes[0].collections
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((1 - 0.196, 1 + 0.196))


def test_it_is_drawn_when_the_run_is_cut_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture that cannot be written is one sentence, and the run's own error stays."""
    logger = CsvTables(str(tmp_path))
    logger.log_metrics({"rollout/score": 0.1}, 1)
    curves = Curves(str(tmp_path))
    curves.on_exception(trainer(logger), SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    assert (tmp_path / "curves.png").exists()
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()
    curves.on_exception(trainer(logger), SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    assert "curves.png could not be written" in caplog.text
    Curves(str(tmp_path / "none")).on_exception(trainer(logger), SimpleNamespace(), KeyboardInterrupt())  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()
