"""Where a run starts from: its own newest sound checkpoint, another run's, or nothing; and whether that may be.

docs/determinism.md says what is promised.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from src.checkpointing.checkpoint import checkpoints
from src.checkpointing.checksum import checksum_matches
from src.checkpointing.metadata import FORMAT, TOLD
from src.config.compose import source_key
from src.errors import CheckpointError, ConfigError

WITH_A_MEMORY = ("ppo.advantage", "ppo.kl_controller", "ppo.old_kl_controller", "ppo.score_scaling")
LENGTHS = ("ppo.num_iterations", "sft.steps", "reward_model.steps")
SAFE = (
    *("overrides", "choices", "run_dir", "log_dir", "name"),  # what the run is called, where it lies
    "allow_config_change",
    *("logger", "log_every", "progress_unit", "sweep_metric"),  # what is said of it
    *("callbacks.checkpoint", "callbacks.stop", "callbacks.progress", "callbacks.samples"),
    *("callbacks.curves", "callbacks.gold"),
    *("trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.default_root_dir"),
    *("ppo.eval_prompts", "sft.eval_rows"),  # of the comparison at the end
    *("ppo.micro_batch_size", "rollout.scoring_batch_size"),  # memory; results up to rounding
    *("ppo.reward_timeout", "nonfinite", "max_sequence_length"),  # limits that raise an error and change no number
    *("model.path", "model.name", "reward.path", "data.path"),  # weights, tokenizer and rows are compared themselves
)


def find_checkpoint(config: DictConfig) -> Path | None:
    """The checkpoint that the run in `config.run_dir` goes on from; None: it starts at its beginning.

    With `resume=auto` it is the run's own; with `resume=PATH` (a checkpoint or a run folder) that one, until the run
    has its own. Raises `CheckpointError` when none of a folder's checkpoints can be read, and `ConfigError` when
    settings that change results differ from the checkpoint's and `allow_config_change` is not set.
    """
    if config.resume == "never":
        return None
    found = newest_intact(Path(config.run_dir) / "checkpoints", set_aside=True)
    if found is None and config.resume != "auto":
        found = given(config.resume)
    if found is not None:
        _refuse_changes(config, found)
    return found


def given(resume: str) -> Path:
    """The checkpoint that `resume=PATH` names."""
    path = Path(resume).expanduser()
    if path.is_dir():
        found = newest_intact(path / "checkpoints" if (path / "checkpoints").is_dir() else path, set_aside=False)
        if found is None:
            raise ConfigError(f"resume={resume}: there is no checkpoint in that folder")
        return found
    if not path.is_file():
        raise ConfigError(f"resume={resume}: must be auto, never, a checkpoint or a run folder; there is no such file")
    if not checksum_matches(path):
        raise CheckpointError(f"resume={resume}: the file is torn or was changed, its checksum is wrong")
    return path


def newest_intact(folder: Path, *, set_aside: bool) -> Path | None:
    """The newest checkpoint with a right checksum; None when there is none at all.

    Damaged ones are named in a warning and, with `set_aside`, renamed, so that they count for nothing any more.
    """
    saved = checkpoints(folder)
    damaged: list[Path] = []
    while saved and not checksum_matches(saved[-1]):
        damaged.append(saved.pop())
    if not damaged:
        return saved[-1] if saved else None
    names = ", ".join(path.name for path in damaged)
    if not saved:
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be read ({names}: torn, or changed since): resume=never starts "
            f"anew in another folder"
        )
    warnings.warn(f"{names} in {folder}: torn, or changed since; going back to {saved[-1].name}", stacklevel=2)
    for path in damaged if set_aside else ():
        path.rename(path.with_suffix(".damaged"))
    return saved[-1]


def changed_keys(before: dict[str, Any], config: DictConfig) -> list[str]:
    """The keys whose values differ from a checkpoint's resolved configuration, each where it was written, sorted."""
    old, new = flat(before), flat(plain(config))
    differing = [key for key in old.keys() | new.keys() if old.get(key, KeyError) != new.get(key, KeyError)]
    return sorted({source_key(config, key) for key in differing})


def describe_changes(before: dict[str, Any], config: DictConfig, keys: list[str]) -> str:
    """What the first eight of the keys were and are, in words."""
    old, new = flat(before), flat(plain(config))
    said = ", ".join(f"{key} ({old.get(key, 'not set')} -> {new.get(key, 'not set')})" for key in keys[:8])
    return said + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def is_safe(key: str, config: DictConfig) -> bool:
    """Whether a run may go on with another value of `key`: its numbers stay the same up to rounding.

    The length of a stage may change when the learning rate does not depend on it.
    """
    if key in (*LENGTHS, "schedule_steps"):
        return config.choices.lr_schedule == "constant"
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE)


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration in plain types; `resume` counts only where it names another run's checkpoint."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    given_path = content["resume"] not in ("auto", "never")
    return {str(key): value for key, value in content.items()} | {"resume": content["resume"] if given_path else None}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {k: v for name, value in node.items() for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()}


def _refuse_changes(config: DictConfig, path: Path) -> None:
    """Say which keys differ; refuse those that change results."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, which this project never writes: it is not opened"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of the project: resume=never starts anew")
    before = checkpoint["run"]["config"]
    own = path.parent.parent == Path(config.run_dir)
    changed = [key for key in changed_keys(before, config) if own or key != "resume"]
    unsafe = [key for key in changed if not is_safe(key, config)]
    if unsafe and not config.allow_config_change:
        raise ConfigError(
            f"{path} was made with other settings, and these change results: "
            f"{describe_changes(before, config, unsafe)}; give the same again, or {TOLD}; resume=never or another name "
            f"starts anew"
        )
    now, silent = flat(plain(config)), ("overrides", "choices", "run_dir")
    made_here = [key for key in ("model.path", "reward.path") if now.get(key) is None]  # and found again later

    def counts(key: str) -> bool:
        return not (key in made_here or key.split(".")[0] in silent or key.endswith(".folder"))

    shown = [key for key in changed if key in unsafe or counts(key)]
    if shown:
        kinds = [kind for kind in WITH_A_MEMORY if f"{kind}._target_" in shown]
        afresh = f"; what {', '.join(kinds)} remembers begins afresh where it was not kept" if kinds else ""
        print(f"going on from {path} with other settings: {', '.join(shown)}{afresh}")
