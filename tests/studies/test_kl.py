"""The study of the KL's two forms from the command line (slow: it trains the policy that it measures)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.loggers.csv import read_table
from studies.kl.__main__ import main


@pytest.mark.slow
def test_both_forms_are_measured_on_the_same_rollouts_and_training_is_not_disturbed(tmp_path: Path) -> None:
    """While the policy is the reference, both KLs are 0 and only the score is left; later k1 has more noise."""
    shared = ["experiment=quick", f"log_dir={tmp_path}"]
    study = [sys.executable, "-m", "studies.kl", *shared, "--moments", "0", "3", "--batches", "4"]
    run = subprocess.run(study, check=True, capture_output=True, text=True)
    (folder,) = (tmp_path / "kl").iterdir()
    assert str(folder) in run.stdout
    found = json.loads((folder / "kl_variance.json").read_text(encoding="utf-8"))
    start, later = found["0"], found["3"]
    assert start["KL part, k1"]["variance"] == 0
    assert start["KL part, exact"]["variance"] == pytest.approx(0, abs=1e-12)
    assert start["whole, k1"]["variance"] == pytest.approx(start["whole, exact"]["variance"], rel=1e-4)
    assert 0 < later["KL part, exact"]["variance"] < later["KL part, k1"]["variance"]
    subprocess.run([sys.executable, "-m", "src.train", *shared], check=True, capture_output=True)
    (plain,) = (tmp_path / "ppo").iterdir()
    of_study, of_run = read_table(folder / "metrics.csv"), read_table(plain / "metrics.csv")
    assert [row["policy/loss"] for row in of_study.values()] == [row["policy/loss"] for row in of_run.values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "2"], "--batches"),
        (["--moments", "99"], "--moments"),
        (["kl=both"], "kl=reward"),
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
    monkeypatch.setattr(sys, "argv", ["studies.kl", f"log_dir={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert message in sentence
    assert not list(tmp_path.rglob("*.ckpt"))
