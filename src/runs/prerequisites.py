"""SFT and reward models that a run needs and that nobody has given: trained once, kept under `logs/artifacts`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from src.config.compose import compose, settings_hash, with_value
from src.config.errors import key_of
from src.errors import ConfigError
from src.runs.folder import make_folder

Train = Callable[[DictConfig], dict[str, Any]]

SOURCES = (
    "core",
    "kernels",
    "data",
    "models",
    "rewards",
    "rollout",
    "modules/sft.py",
    "modules/reward.py",
    "modules/supervised.py",
    "callbacks/normalize.py",
    "utils/seeding.py",
)
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "lightning", "vaderSentiment")


def ensure(config: DictConfig, train: Train) -> None:
    """Fill in `model.path` and `reward.path` where they are null, training what is lacking.

    A model without `path` is one made from scratch: its SFT stage is run, with the experiment, data and model that were
    asked for. A learned reward without `path` is the experiment's own small reward model, which reads text and so
    serves any policy; an adapter without `path` is trained on the model at hand. Nothing else is ever trained unasked.
    """
    asked = [o for o in config.overrides if key_of(o).split(".")[0] in ("experiment", "data", "log_dir")]
    model = [o for o in config.overrides if key_of(o).split(".")[0] == "model"]
    if config.stage != "sft" and config.model.path is None:
        config.model.path = _artifact(["stage=sft", *asked, *model], train)
    if config.stage == "ppo" and "path" in config.reward and config.reward.path is None:
        if config.choices.reward == "adapter":
            own, base = ["reward_net=adapter", *model], config.model.path
        else:
            own, base = [], _artifact(["stage=sft", *asked], train)
        config.reward.path = _artifact(["stage=reward", *asked, *own, with_value("model.path", base)], train)


def _artifact(overrides: list[str], train: Train) -> str:
    """The folder of the model that `overrides` describe, trained now if it is not there yet: of a reward its run's."""
    config = compose(overrides)
    root = Path(config.log_dir) / "artifacts"
    final = root / f"{config.stage}-{_key(config)}"
    try:
        make_folder(root)
    except OSError as error:
        raise ConfigError(f"log_dir={config.log_dir}: cannot write to {root} ({error.strerror})") from error
    with FileLock(f"{final}.lock"):  # a parallel job that needs the same one waits, then finds it
        if not (final / "result.json").exists():
            print(f"no {config.stage} model yet for this configuration: training it into {final}")
            working = root / f"{final.name}.tmp"  # one that was interrupted is gone on with
            config.run_dir = str(working)
            train(config)
            working.rename(final)
    return str((final if config.stage == "reward" else final / "model").resolve())


def _key(config: DictConfig) -> str:
    """A hash of the configuration, of the code that makes the model, and of the libraries' versions."""
    digest = hashlib.sha256(settings_hash(config, "logger", "callbacks").encode())
    here = Path(__file__).parents[1]
    for source in SOURCES:
        path = here / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    digest.update(" ".join(f"{name}={version(name)}" for name in LIBRARIES).encode())
    return digest.hexdigest()[:12]
