"""Sweeps whose jobs another launcher of Hydra runs, each in a process of its own: they end with the same table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_RUN
from tests.tiny import write_lm

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_sweep_of_two_ends_with_the_table(name: str, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{name}_launcher", reason="the extra `sweep` is not installed")
    base = write_lm(tmp_path / "base")
    command = [sys.executable, "-m", "src.train", "-m", *LAUNCHERS[name], *TINY_RUN, f"model.path={base}"]
    command += [f"log_dir={tmp_path}", "ppo.num_iterations=1", "ppo.critic_warmup=0", "ppo.kl_coef=0.02,0.05"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 jobs" in done.stdout
    assert len(list(tmp_path.glob("ppo/*/result.json"))) == 2
    (page,) = tmp_path.glob("sweeps/*/comparison.html")
    text = page.read_text(encoding="utf-8")
    assert "ppo.kl_coef" in text
    again = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert len(list(tmp_path.glob("ppo/*"))) == 2
