"""Curves that leave the band of other seeds are named with the place; those of healthy runs are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.bands import left_out, write_short
from src.loggers.csv import read_table
from src.report import bands
from src.report.bands import ROWS, Band, band_of_tables, left, other_settings, read_band, write_band
from src.report.findings import findings
from src.report.page import write_page
from src.report.read import read_run
from src.runs.report import unusual
from tests.report.runs import write_run

UNUSUAL = {"sentiment": set(), "arithmetic": {4}}
RECORDED = Path(__file__).parent / "recorded"
SICK = {  # recorded by benchmarks/sick.py: the curve that leaves first, and that it does so before this step
    "wrong_sign": ("rollout/kl", 10),
    "lr_times_30": ("rollout/kl", 10),
    "mask_early": ("rollout/gold", 15),
    "mask_late": ("policy/old_kl", 2),
    "values_late": ("rollout/score", 10),
}


def rising(shift: float = 0.0, rows: int = 30, name: str = "rollout/score"):
    return {step: {name: step + shift} for step in range(1, rows + 1)}


@pytest.fixture
def band():
    return band_of_tables("made_up", {1: rising(0.0), 2: rising(2.0), 3: rising(0.5)})


def test_a_band_holds_the_median_and_the_range_of_the_rows_near(band):
    """Two rows before and after: a range from step - 2 to step + 2 + 2."""
    curve = band.curves["rollout/score"]
    assert band.seeds == [1, 2, 3]
    assert curve.median == [step + 0.5 for step in range(1, 31)]
    assert curve.low[10] == 9
    assert curve.high[10] == 15
    assert curve.ends()[11] == (9 - 3, 15 + 3)


def test_a_curve_without_any_width_has_a_band_of_a_twentieth_of_its_level():
    level = {step: {"rollout/score": 2.0} for step in range(1, 9)}
    ends = band_of_tables("made_up", {1: level, 2: level}).curves["rollout/score"].ends()
    assert list(ends.values()) == [pytest.approx((1.95, 2.05))] * 8


@pytest.mark.parametrize(("rows", "named"), [(ROWS - 1, False), (ROWS, True), (12, True)])
def test_a_curve_has_left_after_enough_rows_on_one_side(rows, named, band):
    changed = rising() | {step: {"rollout/score": step - 40.0} for step in range(8, 8 + rows)}
    found = left(changed, band)
    assert [(one.step, one.rows, one.value) for one in found] == ([(8, rows, -32.0)] if named else [])
    both = rising() | {step: {"rollout/score": step - 40.0 * (-1) ** step} for step in range(8, 8 + rows)}
    assert left(both, band) == []


def test_what_is_not_finite_has_left_and_what_is_not_there_has_not(band):
    assert left({}, band) == []
    (found,) = left({step: {"rollout/score": math.nan} for step in range(1, 31)}, band)
    assert found.step == 1


def test_a_band_is_read_as_it_was_written(band, tmp_path, monkeypatch):
    monkeypatch.setattr(bands, "HOME", tmp_path)
    write_band(band, tmp_path / "made_up.json")
    read_band.cache_clear()
    assert read_band("made_up") == band
    assert read_band("other") is None
    read_band.cache_clear()


@pytest.fixture
def banded(band, monkeypatch):
    """The experiment `sentiment` with a band: its score rises from 1 to 30."""
    monkeypatch.setattr(bands, "read_band", lambda name: band if name == "sentiment" else None)


def test_a_run_is_drawn_over_its_band_and_what_left_is_named_at_its_end(banded, tmp_path):
    good = write_run(tmp_path / "good", metrics=rising())
    bad = write_run(tmp_path / "bad", "ppo.lr=0.5", "seed=3", metrics=rising(-40.0))
    assert unusual(good) == []
    assert not any(" left " in found.what for found in findings(read_run(good)))
    title = "left the band of 3 seeds of experiment=made_up, which has other settings (ppo.lr)"
    assert unusual(bad)[0] == title
    assert unusual(bad)[1].startswith("  rollout/score\n    from step 1 on for 30 rows: -39, usual ")
    assert f"1 curve {title}" in [found.what for found in findings(read_run(bad))]
    for folder in (good, bad):
        assert "median of other seeds from 1.5 at 1 to 30.5 at 30" in write_page(folder).read_text(encoding="utf-8")


def test_seed_logger_and_device_are_no_other_settings(tmp_path):
    folder = write_run(tmp_path / "run", "seed=7", "logger=wandb", "trainer.accelerator=cpu", "ppo.log_every=2")
    assert other_settings(read_run(folder)) == []


def tables(experiment):
    files = {int(path.stem.rsplit("_", 1)[1]): path for path in RECORDED.glob(f"{experiment}_seed_*.csv")}
    return {seed: read_table(path) for seed, path in sorted(files.items())}


@pytest.mark.parametrize("path", sorted(bands.HOME.glob("*.json")), ids=lambda path: path.stem)
def test_the_recorded_band_is_that_of_the_recorded_seeds(path, tmp_path):
    recorded = tables(path.stem)
    band = read_band(path.stem)
    assert isinstance(band, Band)
    write_band(band_of_tables(path.stem, recorded), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert path.stat().st_size < 30_000


@pytest.mark.parametrize("path", sorted(bands.HOME.glob("*.json")), ids=lambda path: path.stem)
def test_which_seeds_leave_the_band_of_the_others(path):
    """How often a run would be called unusual: of ten seeds none, and of sums one, whose SFT learned half of them."""
    left_bands = {seed for seed, found in left_out(path.stem, tables(path.stem)).items() if found}
    assert left_bands == UNUSUAL[path.stem]
    assert len(tables(path.stem)) == 10


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_leaves_the_band_and_the_report_says_where(name, tmp_path):
    """Recorded runs of experiment=sentiment: the KL with the wrong sign, 30 times the learning rate, shifted masks."""
    healthy = read_band("sentiment")
    assert healthy.seeds == list(range(1, 11))
    folder = write_run(tmp_path / name, metrics=read_table(RECORDED / "sick" / f"sentiment_{name}.csv"))
    run = read_run(folder)
    first = left(run.metrics, healthy)[0]
    assert (first.name, first.step < SICK[name][1]) == (SICK[name][0], True)
    (found,) = [found for found in findings(run) if found.curves]
    assert found.curves == tuple(left(run.metrics, healthy))
    assert found.what == f"{len(found.curves)} curves left the band of 10 seeds of experiment=sentiment"
    assert found.numbers == f"first {first.name} {first.numbers()}"
    row = f"<code>{first.name}</code></th><td>{first.step}</td><td>{first.rows}</td><td>{first.value:.3g}</td>"
    assert row in write_page(folder).read_text(encoding="utf-8")
    assert f"  {first.name}\n    {first.numbers()}" in unusual(folder)


def test_only_what_is_read_is_recorded(tmp_path):
    write_short({1: {"rollout/kl": 0.123456, "time/rollout_seconds": 3.0}, 2: {"rollout/kl": 2.0}}, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "step,rollout/kl\n1,0.1235\n2,2\n"
