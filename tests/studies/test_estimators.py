"""The variance study from the command line (slow: it trains the SFT policy that it measures)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.config.files import options
from studies.estimators.__main__ import main


@pytest.mark.slow
def test_the_study_measures_every_estimator_twice(tmp_path: Path) -> None:
    """And with the reward at the end, no discount and no KL, total return and reward-to-go have the same gradients."""
    command = [sys.executable, "-m", "studies.estimators", "experiment=quick", f"log_dir={tmp_path}"]
    run = subprocess.run([*command, "--warmup", "1", "--batches", "3"], check=True, capture_output=True, text=True)
    (folder,) = (tmp_path / "estimators").iterdir()
    assert {path.name for path in folder.iterdir()} == {"estimators.json", "estimators.md", "estimators.png"}
    assert str(folder) in run.stdout
    found = json.loads((folder / "estimators.json").read_text(encoding="utf-8"))
    names = set(options("advantage"))
    assert {where: set(rows) for where, rows in found.items()} == {"terminal": names, "per token": names}
    terminal = found["terminal"]
    for figure in ("norm", "variance", "cosine"):
        assert terminal["total_return"][figure] == pytest.approx(terminal["reward_to_go"][figure], rel=1e-4)
    dense = found["per token"]
    assert dense["total_return"]["variance"] > dense["reward_to_go"]["variance"]
    # of three batches the norm may be lost in noise
    assert all(rows[name]["variance"] > 0 for rows in found.values() for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "2"], "--batches"),
        (["rollout.samples_per_prompt=1", "--batches", "3"], "samples_per_prompt"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence, exit code 2, and nothing is trained."""
    monkeypatch.setattr(sys, "argv", ["studies.estimators", f"log_dir={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert message in sentence
    assert not list(tmp_path.rglob("*.ckpt"))
