"""A search by Optuna: what it draws, what it refuses, and that a killed one is begun up where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import src.runs.jobs
from src.errors import ConfigError
from src.search import _lock, _next, search
from src.utils.exits import JobFailedError
from tests.conftest import TINY_RUN
from tests.tiny import write_lm

optuna = pytest.importorskip("optuna", reason="the extra `search` is not installed")

SEARCHED = ["ppo.lr=tag(log,interval(1e-5,1e-3))", "ppo.kl_coef=0.02,0.05"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that were asked for; the gold score of each is 1 - ppo.kl_coef, its KL 10, and 0.05 may fail."""
    asked: list[Any] = []

    def run_job(run: Any, record: Any) -> dict[str, Any]:
        asked.append(run)
        if run.ppo.kl_coef == 0.07:
            raise ConfigError("it cannot be")
        if run.ppo.kl_coef == 0.08:
            return {"ppo": {"gold": float("nan"), "score": 7.0, "kl": 10.0}}
        return {"ppo": {"gold": 1 - run.ppo.kl_coef, "score": 7.0, "kl": 10.0}}

    monkeypatch.setattr(src.runs.jobs, "run_job", run_job)
    return asked


def values(folder: Path) -> list[float]:
    (log,) = folder.glob("sweeps/*/study.log")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(log)))
    trials = optuna.load_study(study_name="search", storage=storage).trials
    return [trial.value for trial in trials if trial.value is not None]


def test_gold_minus_the_price_of_the_kl_is_maximized(jobs: list[Any], tmp_path: Path, capsys: Any) -> None:
    search(["trials=5", "kl_price=0.02", f"log_dir={tmp_path}", *SEARCHED])
    assert len(jobs) == 5
    assert all(1e-5 <= run.ppo.lr <= 1e-3 for run in jobs)
    assert len({run.ppo.lr for run in jobs}) == 5
    assert values(tmp_path) == pytest.approx([1 - run.ppo.kl_coef - 0.02 * 10 for run in jobs])
    assert f"{max(values(tmp_path)):.4g}, its figure" in capsys.readouterr().out


def test_without_gold_it_is_the_score_and_a_figure_that_is_given_comes_first(jobs: list[Any], tmp_path: Path) -> None:
    search(["trials=1", "kl_price=0", f"log_dir={tmp_path}", "gold_reward=none", *SEARCHED])
    search(["trials=1", "kl_price=0", f"log_dir={tmp_path}/b", "sweep_metric=ppo.score", *SEARCHED])
    assert values(tmp_path) == values(tmp_path / "b") == [7.0]


def test_a_study_that_is_given_again_goes_on_to_its_number_of_trials(jobs: list[Any], tmp_path: Path) -> None:
    """And draws other values than it has drawn."""
    for trials, wanted in ((3, 3), (3, 3), (6, 6)):
        search([f"trials={trials}", f"log_dir={tmp_path}", *SEARCHED])
        assert len(jobs) == wanted
    assert len({run.ppo.lr for run in jobs}) == 6


@pytest.mark.parametrize(
    ("kl_coef", "sentence"), [(0.07, "it cannot be"), (0.08, "its figure minus the price of its KL is nan")]
)
def test_a_trial_that_fails_is_said_and_does_not_end_the_search(
    kl_coef: float, sentence: str, jobs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts: a search in which all fail ends too."""
    values = f"ppo.kl_coef={kl_coef},{kl_coef}"
    with pytest.raises(JobFailedError):
        search(["trials=3", f"log_dir={tmp_path}", "ppo.lr=interval(1e-5,1e-3)", values])
    assert len(jobs) == 3
    assert capsys.readouterr().err.count(sentence) == 3


def test_a_trial_of_a_killed_process_is_run_again_and_one_of_a_live_process_is_not(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="search")
    study.ask().suggest_float("ppo.lr", 0.1, 0.9)
    params = study.trials[0].params
    held = _lock(tmp_path, 0)
    with held:
        other = subprocess.run(
            [sys.executable, "-c", TRY, str(tmp_path / "trial-0.lock")], capture_output=True, text=True, check=True
        )
    assert other.stdout.strip() == "held"
    begun = _next(study, tmp_path, trials=1)
    assert begun is not None
    trial, lock = begun
    assert trial.suggest_float("ppo.lr", 0.1, 0.9) == params["ppo.lr"]
    lock.release()


TRY = """
import sys
from filelock import FileLock, Timeout
try:
    FileLock(sys.argv[1], timeout=0).acquire()
except Timeout:
    print("held")
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo.lr=0.1"], "nothing is searched"),
        (["trials=0", *SEARCHED], "trials=0: must be at least 1"),
        (["sweep_metric=ppo.gold", "gold_reward=none", *SEARCHED], "measures no gold score"),
        (["ppo.lr=interval(-1,1)"], "ppo.lr=-1"),
        (["ppo.lr=interval(1e-3,1e-5)"], "first value must be less than its last"),
        (["ppo.lr=tag(log,interval(0,1e-3))"], "must begin above 0"),
        (["kl_price=nan", *SEARCHED], "kl_price=nan: must be finite, at least 0"),
        (["ppo.klcoef=1,2"], "there is no key ppo.klcoef"),
    ],
)
def test_what_no_trial_could_be_run_with_is_refused_first(
    arguments: list[str], message: str, jobs: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        search([*arguments, f"log_dir={tmp_path}"])
    assert jobs == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_search_of_six_that_is_killed_after_three_is_begun_up_to_six(tmp_path: Path) -> None:
    """The killed trial is run again in its own folder, those that ended are not; the table has all six."""
    base = write_lm(tmp_path / "base")
    command = [sys.executable, "-m", "src.search", "trials=6", *TINY_RUN, f"model.path={base}", f"log_dir={tmp_path}"]
    command += ["ppo.num_iterations=1", "ppo.critic_warmup=0", *SEARCHED]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as first:
        while len(list(tmp_path.glob("ppo/*/result.json"))) < 3 and first.poll() is None:
            time.sleep(0.05)
        while len(list(tmp_path.glob("ppo/*"))) < 4 and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("ppo/*/result.json"))) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("ppo/*/result.json")}
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (
        len(values(tmp_path)) == len(list(tmp_path.glob("ppo/*/result.json"))) == len(list(tmp_path.glob("ppo/*"))) == 6
    )
    assert "6 jobs" in second.stdout
    (page,) = tmp_path.glob("sweeps/*/comparison.html")
    assert page.stat().st_size > 100_000
    errors = [json.loads(path.read_text())["error"] for path in tmp_path.glob("sweeps/*/jobs/*.json")]
    assert errors == [None] * 6
