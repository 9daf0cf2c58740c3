"""Look for the settings that are worth most, by Optuna (the extra `search`).

  python -m src.search trials=6 'ppo.lr=tag(log,interval(1e-5,1e-3))' ppo.kl_coef=0.02,0.05

Keys with several values are searched: a list, range(FROM,TO,STEP), or
interval(FROM,TO), also as tag(log,...). All others are as in src.train.
  trials=20       finished trials of the study, those of earlier starts included
  kl_price=0.01   what a nat of the KL to the reference costs

Maximized is sweep_metric (ppo.gold where there is a gold reward, else the
stage's main figure) minus, in PPO, kl_price times the KL to the reference.
The study lies in logs/sweeps/NAME/study.log: the same command takes up one
that was killed, its unfinished run first, and several processes that run it
at once share the trials. It ends with the table of a sweep.
"""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from src.config.compose import compose
from src.config.errors import readable
from src.config.files import key_of
from src.config.schema import PPORun, Run
from src.errors import ConfigError, NonFiniteError
from src.utils.exits import JobFailedError, attempt, friendly_errors
from src.utils.terminal import say

if TYPE_CHECKING:
    import optuna

SETTINGS = {"trials": 20, "kl_price": 0.01}
STUDY = "study.log"
FAILED = "failed"  # a trial's attribute with the reason; one without it was killed and is run again


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    with friendly_errors():
        search(given.overrides)


def search(arguments: list[str]) -> None:
    """Run trials until the study has as many as were asked for, and compare them."""
    from src.report.sweep import compare_jobs, sweep_folder
    from src.runs.find import own_settings

    settings, others = own_settings(arguments, SETTINGS)
    overrides = readable(others, sweep=True)
    parsed = OverridesParser.create().parse_overrides(overrides)
    searched = [override for override in parsed if override.is_sweep_override()]
    fixed = [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]
    folder = sweep_folder([*overrides, f"kl_price={settings['kl_price']}"])  # another price is another objective
    study = _study(folder, _with_metric(_refuse(settings, fixed, searched)))
    failed = False
    try:
        while (begun := _next(study, folder, settings["trials"])) is not None:
            trial, lock = begun
            failed |= not _run(study, trial, folder, fixed, searched, settings["kl_price"])
            lock.release()
    finally:
        attempt("the comparison of the search", lambda: compare_jobs(folder, 0.0))
    if any(trial.value is not None for trial in study.trials):
        best = " ".join(_texts(study.best_params))
        say(f"best: {best}\n  {study.best_value:.4g}, its figure minus the price of its KL")
    if failed:
        raise JobFailedError


def _refuse(settings: dict[str, Any], fixed: list[str], searched: list[Override]) -> Run:
    """A run with the first value of each key. Raises `ConfigError` for what no trial could be run with."""
    from src.report.sweep import refuse_missing_figure

    for name, value in settings.items():
        least, allowed = (1, "at least 1") if name == "trials" else (0, "finite, at least 0")
        if not least <= value < math.inf:
            raise ConfigError(f"{name}={value}: must be {allowed}")
    if not searched:
        raise ConfigError("nothing is searched: give a key several values, as ppo.kl_coef=0.02,0.05")
    for override in searched:
        if isinstance(override.value(), Glob) or key_of(override.input_line or "").startswith("hydra"):
            raise ConfigError(f"{override.input_line}: cannot be searched; give a list, a range or an interval")
        _refuse_interval(override)
    run = compose([*fixed, *(f"{override.get_key_element()}={_first(override)}" for override in searched)])
    refuse_missing_figure(run)
    return run


def _refuse_interval(override: Override) -> None:
    """Raise `ConfigError` for an interval from which no value can be drawn."""
    values = override.value()
    if not isinstance(values, IntervalSweep) or values.start is None or values.end is None:
        return
    if not values.start < values.end:
        raise ConfigError(f"{override.input_line}: an interval's first value must be less than its last")
    if "log" in values.tags and not values.start > 0:
        raise ConfigError(f"{override.input_line}: an interval on a logarithmic scale must begin above 0")


def _first(override: Override) -> str:
    value = override.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))


def _with_metric(run: Run) -> Run:
    """The run with the figure that is maximized: gold, where it is measured and no other is asked for."""
    gold = isinstance(run, PPORun) and run.gold_reward is not None and run.sweep_metric is None
    return run.model_copy(update={"sweep_metric": "ppo.gold"}) if gold else run


def _study(folder: Path, run: Run) -> optuna.Study:
    """The study of a folder, a new one or that of earlier starts. Raises `ConfigError` without Optuna."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("the package optuna is not installed: pip install -e '.[search]'") from error
    from src.report.sweep import metric_of

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / STUDY)))
    direction = "minimize" if metric_of(run).endswith("nll_per_token") else "maximize"
    study = optuna.create_study(storage=storage, study_name="search", direction=direction, load_if_exists=True)
    return study


def _next(study: optuna.Study, folder: Path, trials: int) -> tuple[optuna.Trial, FileLock] | None:
    """The next trial and its lock, one that a killed process has left first; None when there are enough."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    with FileLock(folder / "study.lock"):
        # another seed for each trial: with the same one a study that is taken up, or shared, would draw it again
        study.sampler = TPESampler(seed=len(study.get_trials(deepcopy=False)))
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            with suppress(Timeout), _lock(folder, trial.number):  # held: a process that lives runs it
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.params)
        ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL))
        if sum(trial.state != TrialState.FAIL or FAILED in trial.user_attrs for trial in ended) >= trials:
            return None
        trial = study.ask()
        lock = _lock(folder, trial.number)
        lock.acquire()
        return trial, lock


def _lock(folder: Path, number: int) -> FileLock:
    """The lock that the process holds that runs a trial; the system releases it when that is killed."""
    return FileLock(folder / f"trial-{number}.lock", timeout=0)


def _run(
    study: optuna.Study, trial: optuna.Trial, folder: Path, fixed: list[str], searched: list[Override], price: float
) -> bool:
    """Run a trial; whether it has a result. One that fails is told so and does not end the search."""
    from optuna.trial import TrialState

    from src.report.sweep import recorded
    from src.runs.folder import name_in_sweep
    from src.runs.jobs import figure_of, run_job

    drawn = {override.get_key_element(): _draw(trial, override) for override in searched}
    overrides = [*fixed, *_texts(drawn)]
    say(f"trial {trial.number + 1}: {' '.join(_texts(drawn))}")
    try:
        with recorded(str(folder), overrides) as record, friendly_errors(overrides, job_of_sweep=True):
            run = _with_metric(compose(overrides))
            if run.name is None:
                run = run.model_copy(update={"name": name_in_sweep(overrides, list(drawn))})
            result = run_job(run, record)
            kl = result["ppo"].get("kl", 0.0) if isinstance(run, PPORun) else 0.0
            objective = figure_of(result, run) - price * kl
            if not math.isfinite(objective):
                raise NonFiniteError(f"its figure minus the price of its KL is {objective}: the trial has no result")
            study.tell(trial, objective)
    except JobFailedError as error:
        trial.set_user_attr(FAILED, str(error))
        study.tell(trial, state=TrialState.FAIL)
        return False
    return True


def _draw(trial: optuna.Trial, override: Override) -> Any:
    """The value of a key in a trial."""
    key, values = override.get_key_element(), override.value()
    if isinstance(values, IntervalSweep):
        assert values.start is not None
        assert values.end is not None
        suggest = trial.suggest_int if isinstance(values.start, int) else trial.suggest_float
        return suggest(key, values.start, values.end, log="log" in values.tags)
    return trial.suggest_categorical(key, list(override.sweep_string_iterator()))


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


if __name__ == "__main__":
    main()
