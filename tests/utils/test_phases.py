"""The stopwatch of the phases, with a clock and a memory that the test moves."""

from __future__ import annotations

import time

import pytest
import torch

from src.utils import phases
from src.utils.phases import Stopwatch


class Machine:
    """What the stopwatch asks: seconds and bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu: bool = False) -> None:
        self.now, self.peak = 100.0, 50
        monkeypatch.setattr(phases, "_now", lambda: self.now)
        monkeypatch.setattr(phases, "_peak", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def work(self, seconds: float, peak: int) -> None:
        """Take some time, and as many bytes at most."""
        self.now += seconds
        self.peak = max(self.peak, peak)

    def reset(self) -> None:
        self.peak = 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_phase_inside_another_does_not_count_for_it_and_all_seconds_are_assigned(machine: Machine) -> None:
    watch = Stopwatch()
    watch.start()
    machine.work(1, 0)
    with watch.phase("scoring"):
        machine.work(2, 0)
        with watch.phase("reward"):
            machine.work(4, 0)
        machine.work(8, 0)
    machine.work(16, 0)
    with watch.phase("reward"):
        machine.work(32, 0)
    seconds, _ = watch.collect()
    assert seconds == {"other": 1 + 16, "scoring": 2 + 8, "reward": 4 + 32}
    assert sum(seconds.values()) == machine.now - 100
    machine.work(3, 0)
    assert watch.collect()[0] == {"other": 3}


def test_without_a_gpu_a_peak_is_known_where_that_of_the_process_rose(machine: Machine) -> None:
    watch = Stopwatch()
    watch.start()
    for name, held in (("rollout", 40), ("policy", 80), ("critic", 70), ("policy", 90)):
        with watch.phase(name):
            machine.work(1, held)
    assert watch.collect()[1] == {"policy": 90}
    with watch.phase("critic"):
        machine.work(1, 85)
    assert watch.collect()[1] == {}
    assert watch.most == 90


def test_on_a_gpu_every_phase_has_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, watch = Machine(monkeypatch, gpu=True), Stopwatch()
    watch.start()
    for name, held in (("rollout", 40), ("policy", 80), ("critic", 70), ("policy", 60)):
        with watch.phase(name):
            machine.work(1, held)
    peaks = watch.collect()[1]
    assert {name: peaks[name] for name in ("policy", "critic")} == {"policy": 80, "critic": 70}
    assert watch.most == 80


def test_a_phase_that_fails_ends_and_one_that_is_not_measured_costs_nothing(machine: Machine) -> None:
    watch = Stopwatch()

    @watch.phase("reward")
    def fail() -> None:
        machine.work(1, 0)
        raise ValueError

    for start in (lambda: None, watch.start):
        start()
        with pytest.raises(ValueError):  # noqa: PT011
            fail()
    machine.work(2, 0)
    assert watch.collect()[0] == {"reward": 1, "other": 2}
    watch.stop()
    machine.work(4, 0)
    assert watch.collect()[0] == {}
    watch.start()
    assert watch.collect()[0] == {"other": 0}


def test_the_clock_is_that_of_the_wall_and_the_memory_that_of_the_process() -> None:
    watch = Stopwatch()
    watch.start()
    with watch.phase("rollout"):
        time.sleep(0.02)
    assert 0.02 <= watch.collect()[0]["rollout"] < 5
    if not torch.cuda.is_initialized():
        before = phases.peak_bytes()
        held = torch.ones(2**26)  # a quarter of a GiB above a peak that may be higher than what is held now
        assert before <= phases.peak_bytes() <= before + 4 * held.numel() + 2**26
        assert phases.peak_bytes() > 2**26
