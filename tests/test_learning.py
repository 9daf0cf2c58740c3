"""The main job learns what it says it learns (slow: the whole embedded default)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_embedded_default_raises_the_gold_score_it_never_trained_on(tmp_path: Path) -> None:
    """The bounds are the project's promises for this task, with the command that the README gives."""
    subprocess.run([sys.executable, "-m", "src.pipeline", f"log_dir={tmp_path}"], check=True)
    (path,) = (tmp_path / "pipeline").glob("*/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["reward_model"]["accuracy"] >= 0.95
    assert result["sft"]["gold"] <= 0.2
    assert result["ppo"]["gold"] >= 0.6
    assert result["ppo"]["kl"] <= 10
    assert result["ppo"]["n"]["kl"] >= 256
    assert result["sft"]["grammatical"] >= 0.9
    assert result["ppo"]["grammatical"] >= 0.8
    assert result["ppo"]["distinct"] >= 0.9
    assert result["improvement"]["interval"]["gold"][0] > 0


@pytest.mark.slow
def test_four_roles_on_one_base_learn_the_same_task(tmp_path: Path) -> None:
    """The reward model is an adapter on the SFT policy: it orders pairs, and PPO on it raises the gold score."""
    given = ["reward_net=adapter", "reward=adapter", f"log_dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "src.pipeline", *given], check=True)
    (path,) = (tmp_path / "pipeline").glob("*/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["reward_model"]["accuracy"] >= 0.88
    assert result["ppo"]["gold"] >= 0.6
    assert result["ppo"]["grammatical"] >= 0.8
    assert result["improvement"]["interval"]["gold"][0] > 0
