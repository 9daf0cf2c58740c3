"""What a sweep maximizes is there, or is refused before the first job."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.report.sweep import metric_of
from src.runs.jobs import figure_of
from src.train import _sweep
from tests.config.composed import composed


def test_gold_without_a_gold_reward_is_refused_before_the_first_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match=r"sweep_metric=ppo\.gold: gold_reward=none measures no gold score"):
        _sweep(["gold_reward=vader,none", "sweep_metric=ppo.gold", f"log_dir={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_the_figure_is_that_of_the_stage_or_the_one_that_is_asked_for() -> None:
    assert [metric_of(composed(f"stage={stage}")) for stage in ("sft", "reward", "ppo")] == [
        "sft.nll_per_token", "reward_model.accuracy", "ppo.score",
    ]  # fmt: skip
    assert figure_of({"ppo": {"score": 1.0, "kl": 2.0}}, composed("sweep_metric=ppo.kl")) == 2.0
    with pytest.raises(ConfigError, match="no such figure, only score"):
        figure_of({"ppo": {"score": 1.0}}, composed("sweep_metric=ppo.grammatical"))
