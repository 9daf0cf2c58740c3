"""Run folders as other commands find them: how a run was configured, whether it is finished, where its model lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.config.compose import compose, with_value
from src.config.errors import key_of
from src.errors import ConfigError
from src.runs.folder import FINISHED


@dataclass(frozen=True)
class Run:
    """A folder that `python -m src.train` made."""

    folder: Path
    config: DictConfig

    @property
    def stage(self) -> str:
        """`sft`, `reward` or `ppo`."""
        return str(self.config.stage)

    @property
    def finished(self) -> bool:
        """Whether its result is written, and so everything else."""
        return (self.folder / FINISHED).is_file()

    @property
    def model(self) -> Path:
        """What it trained, as a plain Hugging Face folder."""
        return self.folder / "model"

    @property
    def before(self) -> str | None:
        """Hub name or folder of the model that it started from; of PPO this is the reference."""
        return self.config.model.path if self.stage != "reward" else None


def find_run(given: str) -> Run | None:
    """The run in a folder, of a pipeline's folder its PPO stage; None for a plain model folder.

    Raises `ConfigError` when the folder is neither.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{given}: there is no such folder")
    for place in (folder, folder / "ppo"):
        saved = place / "config.yaml"
        if saved.is_file():
            config = OmegaConf.load(saved)
            if not isinstance(config, DictConfig) or not {"stage", "model", "overrides"} <= set(config):
                raise ConfigError(f"{saved} is not the configuration of a run")
            return Run(place, config)
    if (folder / "sft").is_dir():
        raise ConfigError(f"{given}: this pipeline has not come to its PPO stage; give the folder of one stage")
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    raise ConfigError(f"{given}: neither a run (no config.yaml) nor a model (no config.json) is in this folder")


def settings_of(run: Run | None, given: str, overrides: list[str]) -> DictConfig:
    """The PPO configuration that a model is measured with: the run's own, changed by `overrides`.

    A plain model folder has none: then it is the defaults of stage=ppo, without any experiment.
    """
    if run is None or run.stage != "ppo":
        model = str(run.model if run is not None else given)
        known = [] if run is None else [o for o in run.config.overrides if key_of(o) == "log_dir"]
        config = compose(["stage=ppo", "experiment=none", with_value("model.path", model), *known, *overrides])
    else:
        config = compose([*_still_read(run.config.overrides, overrides), *overrides])
        _fill_in(config, run.config, "model")
        if "path" in config.reward and config.choices.reward == run.config.choices.reward:
            _fill_in(config, run.config, "reward")
    config.run_dir = config.log_dir  # asked for by the checks; nothing is written there
    return config


def _still_read(own: list[str], overrides: list[str]) -> list[str]:
    """A run's own overrides without the keys of a group (`reward.path`) whose option (`reward`) is chosen anew."""
    chosen = {key_of(override) for override in overrides}
    return [o for o in own if "." not in key_of(o) or key_of(o).split(".")[0] not in chosen]


def _fill_in(config: DictConfig, saved: DictConfig, node: str) -> None:
    """The folder of a model that the run made for itself."""
    if config[node].path is None:
        config[node].path = saved[node].path


def own_settings(arguments: list[str], known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Command-line `key=value` taken apart: the keys in `known`, each of the type of its default, and all others.

    A default of None takes any text. Raises `ConfigError` for a value of another type.
    """
    values, others = dict(known), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            others.append(argument)
            continue
        kind = str if known[key] is None else type(known[key])
        try:
            values[key] = kind(value)
        except ValueError:
            raise ConfigError(f"{argument}: must be a number, like {known[key]}") from None
    return values, others
