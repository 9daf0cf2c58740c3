"""Run folders for other commands: the configuration of a run, whether it is finished, and its model's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.config.compose import compose, restored, settings_hash, with_value
from src.config.files import key_of
from src.config.schema import PPORun, Run
from src.errors import ConfigError
from src.runs.folder import FINISHED, has_result, run_folders
from src.runs.trust import refuse_unknown, without_consent
from src.stages.checks import refuse_damaged


@dataclass(frozen=True)
class RunFolder:
    """A folder of `python -m src.train`."""

    folder: Path
    config: Run

    @property
    def stage(self) -> str:
        """`sft`, `reward` or `ppo`."""
        return self.config.stage

    @property
    def finished(self) -> bool:
        """Whether its result, which is the last file, and its model are there."""
        return has_result(self.folder) and self.model.is_dir()

    def result(self) -> dict[str, Any]:
        """The content of result.json; empty while the run is not finished. Raises `ConfigError` for a spoilt one."""
        file = self.folder / FINISHED
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if has_result(self.folder) else {}
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file} is spoilt: remove it, and the command that trained writes it again") from error

    @property
    def model(self) -> Path:
        """The trained model, a plain Hugging Face folder."""
        return self.folder / "model"

    @property
    def before(self) -> str | None:
        """Hub name or folder of the model that it started from; for PPO the reference."""
        return self.config.model.path if self.stage != "reward" else None


def find_run(given: str, arguments: Sequence[str] = (), trusted: bool = False) -> RunFolder | None:
    """The run in a folder, or the PPO stage in a pipeline's folder; None for a plain model folder.

    Its configuration is what `without_consent` leaves, given this call's `arguments`. Raises `ConfigError` for any
    other folder, and for one whose model is not the one that the run has sealed.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{given}: there is no such folder")
    for place in (folder, folder / "ppo"):
        if (place / "config.yaml").is_file():
            if has_result(place):  # the seal of a finished run
                refuse_damaged(given, str(place))
            return RunFolder(place, without_consent(load_config(place / "config.yaml"), arguments, trusted))
    if (folder / "sft").is_dir():
        raise ConfigError(f"{given}: this pipeline has not reached its PPO stage; give the folder of one stage")
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    raise ConfigError(f"{given}: neither a run (no config.yaml) nor a model (no config.json) is in this folder")


def finished_before(run: Run, revision: str | None, code: dict[str, str]) -> RunFolder | None:
    """A finished run of the same settings and revision, under the name that `run` would have.

    `code` holds the fingerprints of the user's own code (`own_code`). None: there is none. A run from a checkpoint that
    was named (`resume=PATH`) is never one of them.
    """
    for folder in run_folders(Path(run.log_dir) / run.stage, run.name, run.overrides) if run.resume == "auto" else ():
        if not folder.exists():
            return None
        if _is_of(folder, run, revision, code):
            return RunFolder(folder, load_config(folder / "config.yaml"))
    return None


def _is_of(folder: Path, run: Run, revision: str | None, code: dict[str, str]) -> bool:
    """Whether a folder holds a run of these settings; False for one that cannot be read."""
    try:
        saved = load_config(folder / "config.yaml")
        result = RunFolder(folder, saved).result() if RunFolder(folder, saved).finished else {}
        same = (result["git_revision"], result["code"]) == (revision, code)
    except (OSError, KeyError, ValueError):  # ConfigError is a ValueError
        return False
    if not same or saved.resume not in ("auto", "never") or saved.choices != run.choices:
        return False
    for node in [node for node in ("model", "reward") if hasattr(run, node)]:
        run = _filled(run, saved, node)  # a model that is trained for a run is not asked for
    return settings_hash(saved) == settings_hash(run)


def load_config(path: Path) -> Run:
    """The configuration in a run's config.yaml. Raises `ConfigError` for any other file."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        return restored(content)
    except (AttributeError, KeyError, TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not the configuration of a run of this version") from error


def settings_of(run: RunFolder | None, given: str, overrides: list[str], trusted: bool = False) -> PPORun:
    """The PPO configuration that a model is evaluated with: the run's, changed by `overrides`.

    For a plain model folder it is the defaults of stage=ppo, without an experiment. Raises `ConfigError` for what a
    run's folder may not make (`refuse_unknown`) unless it is `trusted`.
    """
    if run is None or not isinstance(run.config, PPORun):
        model = str(run.model if run is not None else given)
        kept = [] if run is None else [o for o in run.config.overrides if key_of(o) == "log_dir"]
        config = compose(["stage=ppo", "experiment=none", with_value("model.path", model), *kept, *overrides])
    else:
        config = compose([*_still_read(run.config.overrides, overrides), *overrides])
        config = _filled(config, run.config, "model")
        if config.choices["reward"] == run.config.choices["reward"]:
            config = _filled(config, run.config, "reward")
        if not trusted:
            refuse_unknown(config, given, overrides)
    if not isinstance(config, PPORun):
        raise ConfigError(f"stage={config.stage}: a model is measured with the settings of stage=ppo")
    return config


def _still_read(own: list[str], overrides: list[str]) -> list[str]:
    """A run's overrides without the keys of a group (`reward.path`) whose option (`reward`) the command chooses."""
    chosen = {key_of(override) for override in overrides}
    return [o for o in own if "." not in key_of(o) or key_of(o).split(".")[0] not in chosen]


def _filled(config: Run, saved: Run, node: str) -> Run:
    """The configuration with the folder of a model that was trained for the run."""
    own = getattr(config, node)
    if getattr(own, "path", "given") is not None:
        return config
    return config.model_copy(update={node: own.model_copy(update={"path": getattr(saved, node).path})})


def own_settings(arguments: list[str], defaults: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Splits the command line's `key=value`: the keys in `defaults`, each of the type of its default, and all others.

    A default of None accepts any text. Raises `ConfigError` for a value of another type.
    """
    values, others = dict(defaults), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in defaults:
            others.append(argument)
            continue
        kind = str if defaults[key] is None else type(defaults[key])
        try:
            values[key] = kind(value)
        except ValueError:
            raise ConfigError(f"{argument}: must be a number, like {defaults[key]}") from None
    return values, others
