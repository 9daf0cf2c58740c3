"""The checkpoint that a run resumes from: its newest intact one, another run's, or none; and whether it may.

docs/determinism.md lists the guarantees.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from src.checkpointing.checkpoint import checkpoints
from src.checkpointing.checksum import checksum_matches
from src.checkpointing.metadata import FORMAT, TO_ALLOW, refuse_shorter
from src.config.files import leaves
from src.config.schema import Run
from src.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

WITH_A_MEMORY = ("ppo.advantage", "ppo.kl_controller", "ppo.old_kl_controller", "ppo.score_scaling")
LENGTHS = ("ppo.num_iterations", "sft.steps", "reward_model.steps")
SAFE = (
    *("overrides", "choices", "run_dir", "log_dir", "name", "allow_config_change"),  # names of the run
    *("logger", "sweep_metric", "ppo.samples", "ppo.stop_on_alarm"),
    *("ppo.log_every", "sft.log_every", "reward_model.log_every"),
    *("callbacks.checkpoint", "callbacks.stop", "trainer.enable_progress_bar"),
    *("ppo.eval_prompts", "sft.eval_rows"),  # of the comparison at the end
    *("ppo.micro_batch_size", "rollout.scoring_batch_size", "rollout.check_every"),  # memory; results up to rounding
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy"),  # who computes what; results up to rounding
    *("rollout.engine.urls", "rollout.engine.folder", "rollout.engine.concurrency", "rollout.engine.cache_gb"),
    *("rollout.engine.timeout", "rollout.engine.patience", "rollout.engine.attempts"),
    *("ppo.reward_timeout", "nonfinite"),  # limits that raise errors and change no result
    *("model.path", "model.name", "reward.path", "data.path"),  # their contents are compared by fingerprints
)


def find_checkpoint(run: Run, code: Mapping[str, str], tell: bool = True) -> Path | None:
    """The checkpoint from which the run in `run.run_dir` resumes; None: the run starts from the beginning.

    With `resume=auto` it is the run's own; with `resume=PATH` (a checkpoint or a run folder) that one, until the run
    has its own. Raises `CheckpointError` when none of a folder's checkpoints can be read, and `ConfigError` when
    settings that change results, or fingerprints of the `code` that they name, differ from the checkpoint's and
    `allow_config_change` is not set. With `tell` one line says where the run resumes.
    """
    if run.resume == "never":
        return None
    found = newest_intact(Path(run.run_dir or "") / "checkpoints", set_aside=True)
    if found is None and run.resume != "auto":
        found = given(run.resume)
    if found is not None:
        _refuse_changes(run, code, found, tell)
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
        raise CheckpointError(f"resume={resume}: the file is damaged, as its checksum is wrong")
    return path


def newest_intact(folder: Path, *, set_aside: bool) -> Path | None:
    """The newest checkpoint with a correct checksum; None if there are no checkpoints.

    Damaged ones are named in a warning and, with `set_aside`, renamed, so that they are ignored later.
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
            f"none of the checkpoints in {folder} can be read ({names}: damaged): resume=never starts "
            f"again in another folder"
        )
    warnings.warn(f"{names} in {folder}: damaged; {saved[-1].name} is used instead", stacklevel=2)
    for path in damaged if set_aside else ():
        with suppress(FileNotFoundError):  # another rank was first
            path.rename(path.with_suffix(".damaged"))
    return saved[-1]


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys whose values differ between two resolved configurations, sorted.

    A value that other keys repeat (`ppo.gamma` in `ppo.advantage.gamma`) is named once, by the key that sets it; a key
    that may change hides none that may not.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    differing = [key for key in old.keys() | new.keys() if old.get(key, KeyError) != new.get(key, KeyError)]
    written: dict[tuple[str, str, str, bool], str] = {}
    for key in sorted(differing, key=lambda key: (-key.count("."), key), reverse=True):
        values = repr(old.get(key, KeyError)), repr(new.get(key, KeyError))
        change = (key.rpartition(".")[2], *values, may_change(key, now))
        if key.count(".") == 0 or change not in written:
            written.setdefault(change, key)
    return sorted(set(written.values()))


def describe_changes(before: dict[str, Any], now: dict[str, Any], keys: list[str]) -> str:
    """`key (old -> new)` for the first eight keys."""
    old, new = dict(leaves(before)), dict(leaves(now))
    listed = ", ".join(f"{key} ({old.get(key, 'not set')} -> {new.get(key, 'not set')})" for key in keys[:8])
    return listed + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def edited_code(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The targets of both whose code is another one now."""
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


def may_change(key: str, now: dict[str, Any]) -> bool:
    """Whether a run may resume with another value of `key`: its results stay the same up to rounding.

    The length of a stage may change when the learning rate does not depend on it, and no batch is drawn ahead: after
    the last iteration none is, and a longer run would lack it. A run that ends with its best policy has gone back to it
    in its last checkpoint, from which a longer one, or one that no alarm ends, would continue.
    """
    best = now.get("ppo", {}).get("held_out", {}).get("best")
    if (key in LENGTHS and (now.get("rollout", {}).get("lag") or best)) or (key == "ppo.stop_on_alarm" and best):
        return False
    if key in LENGTHS:
        return now[key.partition(".")[0]]["lr_schedule"] == "constant_with_warmup"
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE)


def plain_config(run: Run) -> dict[str, Any]:
    """The configuration in plain types; `resume` is None unless it names another run's checkpoint."""
    content = run.plain()
    return content | {"resume": content["resume"] if content["resume"] not in ("auto", "never") else None}


def _refuse_changes(run: Run, code: Mapping[str, str], path: Path, tell: bool) -> None:
    """Refuse changes that change results; say what differs otherwise."""
    checkpoint = opened(path)
    before, now = checkpoint["run"]["config"], plain_config(run)
    own = path.parent.parent == Path(run.run_dir or "")
    changed = [key for key in changed_keys(before, now) if own or key != "resume"]
    unsafe = [key for key in changed if not may_change(key, now)]
    if unsafe and not run.allow_config_change:
        raise ConfigError(
            f"{path} was made with other settings, and these change results: {describe_changes(before, now, unsafe)}; "
            f"give the same again, or {TO_ALLOW}, or resume=never to start again"
        )
    refuse_shorter(checkpoint, now, str(path))
    edited = edited_code(checkpoint["run"]["code"], code)
    if edited and not run.allow_config_change:
        raise ConfigError(
            f"{path} was made with other code of {', '.join(edited)}, whose file has been edited since: restore it, or "
            f"{TO_ALLOW}, or resume=never to start again"
        )
    if tell:
        log.info(f"resuming from {path}{_differences(changed, unsafe, edited, now)}")


def opened(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this version. Raises `CheckpointError` for anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, which this project never writes: it was not opened"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version of the project: resume=never starts again")
    return checkpoint


def _differences(changed: list[str], unsafe: list[str], edited: list[str], now: dict[str, Any]) -> str:
    """A clause on the settings and the code that differ; empty if none does."""
    new, silent = dict(leaves(now)), ("overrides", "choices", "run_dir", "allow_config_change")
    made_here = [key for key in ("model.path", "reward.path") if new.get(key) is None]  # trained and filled in later
    shown = [key for key in changed if key in unsafe or not (key in made_here or key.split(".")[0] in silent)]
    kinds = [kind for kind in WITH_A_MEMORY if f"{kind}._target_" in shown]
    reset = f"; {', '.join(kinds)} start without the state that the checkpoint lacks" if kinds else ""
    other = [f"other settings: {', '.join(shown)}"] if shown else []
    other += [f"other code: {', '.join(edited)}"] if edited else []
    return f" with {' and '.join(other)}{reset}" if other else ""
