"""Train a language model with PPO, or with a stage that comes before it.

  python -m src.train [KEY=VALUE ...] [GROUP=OPTION ...]

Without any, the embedded example: no network, some minutes. Others:

  stage=sft model=gpt2 data=imdb                supervised fine-tuning
  model.path=FOLDER reward=vader                PPO from your model
  reward=function reward.target=my_rewards.f    your own function as the reward
  experiment=arithmetic ppo.clip=0.1            a named set of choices, changed
  -m ppo.clip=0.1,0.2 seed=1,2                  a sweep: four runs
  --cfg job                                     print the configuration and stop
  stage=sft --help                              the keys of another stage

The run lies in logs/STAGE/NAME: report.html, metrics.csv, samples, checkpoints,
the model, result.json. The same command resumes a run that was interrupted.

  python -m src.pipeline                        SFT, reward model and PPO
  python -m src.doctor ...                      what is wrong, before it trains
  python -m src.plan ...                        memory and seconds of PPO
  python -m src.search trials=20 KEY=A,B        the best settings, by Optuna
  python -m src.report RUN ...                  a page about a run, or several
  python -m src.evaluate, src.chat, src.export RUN

docs/options.md lists every option of every group with its keys.
"""

from __future__ import annotations

import argparse
import os
import sys

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from src.config.compose import compose, typed, with_value
from src.config.errors import explain, readable, repeated
from src.config.files import CONF, key_of
from src.config.help import help_page
from src.errors import ConfigError
from src.utils.exits import attempt, friendly_errors
from src.utils.terminal import say


def main() -> None:
    """Entry of the command line. What trains nothing loads neither torch nor Lightning."""
    parser = argparse.ArgumentParser(prog="python -m src.train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--multirun", "-m", action="store_true")
    given = parser.parse_intermixed_args()
    with friendly_errors():
        overrides = readable(given.overrides, sweep=given.multirun)
        if given.multirun:
            _sweep(overrides)
        elif given.help:
            print(__doc__)
            Console().print(help_page(compose(overrides)), highlight=False)
        elif given.cfg:
            print(OmegaConf.to_yaml(compose(overrides).plain()), end="")
        else:
            for sentence in repeated(overrides):
                say(sentence)
            run = compose(overrides)
            from src.runs.start import start_run  # torch, transformers and Lightning: seconds, for what trains alone

            start_run(run)


def _sweep(overrides: list[str]) -> None:
    """Check all combinations, let Hydra's sweeper and launcher run `job` for each, and compare them."""
    from src.report.sweep import begin, compare_jobs, refuse_missing_figure, sweep_folder

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on to `friendly_errors`
    folder = sweep_folder(overrides)
    sys.argv[1:] = ["--multirun", *overrides, with_value("hydra.sweep.dir", str(folder))]
    try:
        for combination in combinations(overrides):
            refuse_missing_figure(compose(combination))
        started = begin(folder, swept_keys(overrides))
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
        finally:
            attempt("the comparison of the sweep", lambda: compare_jobs(folder, started))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides)) from error


def swept_keys(overrides: list[str]) -> list[str]:
    """The keys and groups with several values."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [override.get_key_element() for override in parsed if override.is_sweep_override()]


def combinations(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job; empty where they are known later: of another sweeper, by glob, in a file."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    keys = [override.get_key_element() for override in parsed]
    if any(key.startswith(("hydra/sweeper", "hydra.sweeper")) for key in keys):
        return []
    if any(isinstance(override.value(), Glob) for override in parsed):
        return []
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [[override for override in job if not key_of(override).startswith("hydra")] for job in jobs]


def job(config: DictConfig) -> float:
    """One run of a sweep; returns the figure that sweepers maximize (`sweep_metric`).

    A job that was finished before, with the same settings and revision, is not run again unless `resume=never`.
    """
    from src.report.sweep import recorded, swept_in
    from src.runs.folder import name_in_sweep
    from src.runs.jobs import figure_of, run_job

    settings = HydraConfig.get()
    overrides = [str(override) for override in OmegaConf.to_container(settings.overrides.task, resolve=False) or ()]
    say(f"job {settings.job.num + 1}: {' '.join(overrides)}")
    with recorded(settings.sweep.dir, overrides) as record, friendly_errors(overrides, job_of_sweep=True):
        run = typed(config, dict(settings.runtime.choices), overrides)
        if run.name is None:
            run = run.model_copy(update={"name": name_in_sweep(overrides, swept_in(settings.sweep.dir))})
        return figure_of(run_job(run, record), run)


if __name__ == "__main__":
    main()
