"""Seconds and memory of an iteration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks import resources
from src.callbacks.resources import Resources, memory_gib


def test_the_seconds_are_those_between_rollout_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(resources.time, "perf_counter", lambda: next(clock))
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=lambda numbers, batch_size: logged.update(numbers))
    callback = Resources()
    callback.on_train_batch_start(SimpleNamespace(), module, None, 0)  # type: ignore[arg-type]
    callback.on_train_batch_end(SimpleNamespace(), module, None, None, 0)  # type: ignore[arg-type]
    assert logged["time/update_seconds"] == 2.5
    assert logged["time/memory_gib"] == pytest.approx(memory_gib(), rel=0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the memory of the process")
def test_memory_grows_by_what_is_held() -> None:
    before = memory_gib()
    held = torch.ones(2**27)  # half a GiB
    assert 0.4 < memory_gib() - before < 0.7
    assert held[0] == 1
