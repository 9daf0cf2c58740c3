"""Which checkpoint a run starts from, and what may have changed since it was written."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpointing.checksum import seal
from src.checkpointing.resume import changed_keys, find_checkpoint, flat, is_safe, plain
from src.config.compose import compose
from src.errors import CheckpointError, ConfigError
from src.runs.folder import name_of, run_folder


@cache
def composed(*overrides: str) -> Any:
    return compose(["stage=ppo", *overrides])


def configured(folder: Path, *overrides: str) -> Any:
    config = copy.deepcopy(composed(*overrides))
    config.run_dir = str(folder)
    return config


def written(folder: Path, config: Any, number: int = 3, **content: Any) -> Path:
    """A checkpoint of nothing but a record."""
    path = folder / f"checkpoints/iteration-{number}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": 1, "run": {"config": plain(config)}} | content, path.with_suffix(".tmp"))
    seal(path.with_suffix(".tmp"), path)
    return path


@pytest.mark.parametrize(("overrides", "keys"), [
    ([], []),
    (["ppo.clip=0.3"], ["ppo.clip"]),
    (["ppo.lr=0.5"], ["ppo.lr"]),  # the critic's rate and both optimizers refer to it
    (["seed=4"], ["seed"]),
    (["value_loss=mse"], ["ppo.value_loss._target_", "ppo.value_loss.value_clip"]),
    (["kl_controller=adaptive"], ["ppo.kl_controller._target_", "ppo.kl_horizon", "ppo.kl_target"]),
    (["ppo.score_clip=3", "rollout.temperature=0.5"], ["ppo.score_clip", "rollout.temperature"]),
    (["early_stop=gold"], ["callbacks.early_stop._target_", "callbacks.early_stop.drop",
                           "callbacks.early_stop.patience", "callbacks.early_stop.window"]),
    (["trainer.precision=bf16-mixed"], ["trainer.precision"]),
])  # fmt: skip
def test_what_changes_results_is_named_where_it_was_written_and_refused(
    overrides: list[str], keys: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, configured(tmp_path))
    now = configured(tmp_path, *overrides)
    unsafe = [key for key in changed_keys(plain(configured(tmp_path)), now) if not is_safe(key, now)]
    assert set(keys) <= set(unsafe) if keys else unsafe == []
    assert not [key for key in unsafe if key.split(".")[0] in ("module", "datamodule", "checks")]
    if keys:
        with pytest.raises(ConfigError, match=rf"{keys[0]} \(.* -> .*\).*allow_config_change=true") as refused:
            find_checkpoint(now)
        assert "\n" not in str(refused.value)
        assert find_checkpoint(configured(tmp_path, *overrides, "allow_config_change=true")) == path
        assert find_checkpoint(configured(tmp_path, *overrides, "resume=never")) is None
    else:
        assert find_checkpoint(now) == path


@pytest.mark.parametrize("override", [
    "callbacks.checkpoint.every=1", "callbacks.checkpoint.best_metric=rollout/score", "callbacks.samples.rows=3",
    "logger=wandb", "ppo.eval_prompts=3", "ppo.micro_batch_size=4", "rollout.scoring_batch_size=4",
    "ppo.reward_timeout=3", "log_dir=elsewhere", "name=other", "trainer.enable_progress_bar=false",
    "callbacks.stop.grace_seconds=5", "model.path=other", "reward.path=other",
])  # fmt: skip
def test_what_changes_no_result_is_taken_and_named(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, configured(tmp_path))
    written_out = "+" + override if "progress_bar" in override else override
    assert find_checkpoint(configured(tmp_path, written_out)) == path
    key = override.split("=")[0]
    said = capsys.readouterr().out
    assert said.startswith(f"going on from {path} with other settings: ")
    assert key in said


def test_what_is_said_to_cost_memory_alone_reaches_passes_alone(tmp_path: Path) -> None:
    """Not the batches of the comparison, which have draws of their own: its figures would be others."""
    makers = {
        "rollout.scoring_batch_size": ["callbacks.rollout.maker.batch_size"],
        "ppo.micro_batch_size": ["module.settings.micro_batch_size", "ppo.settings.micro_batch_size"],
    }
    before = flat(plain(configured(tmp_path)))
    for key, readers in makers.items():
        after = flat(plain(configured(tmp_path, f"{key}=4")))
        ignored = ("overrides", "choices", "name", "checks")
        changed = {name for name in after if after[name] != before[name] and name.split(".")[0] not in ignored}
        assert key in changed <= {key, *readers}


def test_what_begins_afresh_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, configured(tmp_path))
    other = ("kl_controller=adaptive", "policy_loss=kl_penalty")
    find_checkpoint(configured(tmp_path, *other, "allow_config_change=true"))
    said = capsys.readouterr().out.strip()
    assert said.endswith(
        "; what ppo.kl_controller, ppo.old_kl_controller remembers begins afresh where it was not kept"
    )
    find_checkpoint(configured(tmp_path, "ppo.clip=0.3", "allow_config_change=true"))
    assert "; what" not in capsys.readouterr().out


def test_a_stage_may_be_lengthened_where_the_learning_rate_does_not_depend_on_its_length(tmp_path: Path) -> None:
    constant = "lr_schedule=constant"
    path = written(tmp_path / "constant", configured(tmp_path / "constant", constant))
    assert find_checkpoint(configured(tmp_path / "constant", constant, "ppo.num_iterations=300")) == path
    written(tmp_path / "linear", configured(tmp_path / "linear"))
    with pytest.raises(ConfigError, match=r"ppo.num_iterations \(\d+ -> 300\)"):
        find_checkpoint(configured(tmp_path / "linear", "ppo.num_iterations=300"))


def test_a_path_is_a_checkpoint_or_a_run_folder_until_the_run_has_its_own(tmp_path: Path) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    older, newer = (written(other, configured(other), number) for number in (9, 10))
    from_file = configured(mine, f"resume={older}")
    assert find_checkpoint(from_file) == older
    for folder in (other, other / "checkpoints"):
        assert find_checkpoint(configured(mine, f"resume={folder}")) == newer
    with pytest.raises(ConfigError, match=r"ppo.clip \(0.2 -> 0.3\)"):
        find_checkpoint(configured(mine, f"resume={older}", "ppo.clip=0.3"))
    own = written(mine, from_file, 12)
    assert find_checkpoint(from_file) == own
    with pytest.raises(ConfigError, match=r"resume \(.*iteration-9.ckpt -> None\)"):
        find_checkpoint(configured(mine))  # the folder was not begun by this command
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in that folder"):
        find_checkpoint(configured(tmp_path / "new", f"resume={tmp_path / 'empty'}"))
    older.write_bytes(older.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="torn"):
        find_checkpoint(configured(tmp_path / "new", f"resume={older}"))


def test_the_same_path_finds_its_own_folder_again(tmp_path: Path) -> None:
    first = run_folder(tmp_path, None, ["resume=a/iteration-3.ckpt"], "a/iteration-3.ckpt")
    first.mkdir()
    assert run_folder(tmp_path, None, ["resume=a/iteration-3.ckpt"], "a/iteration-3.ckpt") == first
    names = [name_of([f"resume={value}"]) for value in ("auto", "never", "a/iteration-3.ckpt", "b/iteration-3.ckpt")]
    assert names[:2] == ["default", "default"]
    assert len(set(names)) == 3


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    written(tmp_path, configured(tmp_path), format=0)
    with pytest.raises(CheckpointError, match="not written by this version"):
        find_checkpoint(configured(tmp_path))


def test_flat_keeps_every_leaf() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_models_that_a_run_made_for_itself_are_no_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint knows their folders; the same command comes to them later."""
    path = written(tmp_path, configured(tmp_path, "model.path=made", "reward.path=made"))
    assert find_checkpoint(configured(tmp_path)) == path
    assert capsys.readouterr().out == ""
