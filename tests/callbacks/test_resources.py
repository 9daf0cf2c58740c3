"""Seconds and memory of an iteration."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks import resources
from src.callbacks.resources import Resources, memory_gib
from src.loggers.csv import read_table
from src.utils.phases import STOPWATCH, Stopwatch


def test_a_row_has_the_seconds_of_each_phase_and_the_peaks_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, logged, given = Stopwatch(), {}, SimpleNamespace()
    monkeypatch.setattr(resources, "STOPWATCH", watch)
    monkeypatch.setattr(watch, "collect", lambda: ({"policy": 2.5, "other": 1.0}, {"policy": 3 * 2**30}))
    module: Any = SimpleNamespace(log_dict=lambda numbers, batch_size: logged.update(numbers))
    callback: Any = Resources()
    callback.on_train_start(given, module)
    assert watch.running
    callback.on_train_batch_end(given, module, None, None, 0)
    held = logged.pop("time/memory_gib")
    assert logged == {"time/seconds_policy": 2.5, "time/seconds_other": 1.0, "time/peak_gib_policy": 3.0}
    assert held == pytest.approx(memory_gib(), rel=0.2)
    callback.on_exception(given, module, ValueError())
    assert not watch.running
    watch.start()
    callback.on_train_end(given, module)
    assert not watch.running


def test_a_run_names_its_phases_and_their_seconds_are_no_more_than_it_took(tiny_run: Any) -> None:
    folder, _ = tiny_run
    took = json.loads((folder / "result.json").read_text())["seconds"]
    rows = read_table(folder / "timing.csv")
    names = [{name.removeprefix("time/seconds_") for name in row if "seconds" in name} for row in rows.values()]
    assert names[0] == {"rollout", "reward", "scoring", "policy", "critic", "other"}
    assert set().union(*names) == names[0] | {"measuring", "saving"}
    assert 0 < sum(value for row in rows.values() for name, value in row.items() if "seconds" in name) < took + 0.1
    assert not STOPWATCH.running


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the memory of the process")
def test_memory_grows_by_what_is_held() -> None:
    before = memory_gib()
    held = torch.ones(2**27)  # half a GiB
    assert 0.4 < memory_gib() - before < 0.7
    assert held[0] == 1
