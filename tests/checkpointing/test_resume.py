"""Which checkpoint a run starts from, and what may have changed since it was written."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpointing.checksum import seal
from src.checkpointing.resume import changed_keys, find_checkpoint, may_change, plain_config
from src.config.compose import compose
from src.config.files import leaves
from src.config.schema import Run
from src.errors import CheckpointError, ConfigError
from src.runs.folder import name_of, run_folder
from src.stages.ppo import PPOStage, settings_of
from tests.tiny import TinyCorpus, tokenizer


@cache
def composed(*overrides: str) -> Run:
    return compose(["stage=ppo", *overrides])


def configured(folder: Path, *overrides: str) -> Run:
    return composed(*overrides).model_copy(update={"run_dir": str(folder)})


def written(folder: Path, run: Run, number: int = 3, **content: Any) -> Path:
    """A checkpoint of nothing but a record."""
    path = folder / f"checkpoints/iteration-{number}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"format": 2, "run": {"config": plain_config(run), "code": {}}} | content, path.with_suffix(".tmp"))
    seal(path.with_suffix(".tmp"), path)
    return path


@pytest.mark.parametrize(("overrides", "keys"), [
    ([], []),
    (["ppo.clip=0.3"], ["ppo.clip"]),
    (["ppo.lr=0.5"], ["ppo.lr"]),  # the critic's rate and both optimizers refer to it
    (["seed=4"], ["seed"]),
    (["rollout.lag=1"], ["rollout.lag"]),
    (["correction=truncate"], ["rollout.correction._target_", "rollout.correction_cap"]),
    (["rollout.check_every=3"], []),
    (["value_loss=mse"], ["ppo.value_clip", "ppo.value_loss._target_"]),
    (["kl_controller=adaptive"], ["ppo.kl_controller._target_", "ppo.kl_horizon", "ppo.kl_target"]),
    (["ppo.score_clip=3", "rollout.temperature=0.5"], ["ppo.score_clip", "rollout.temperature"]),
    (["early_stop=gold"], ["ppo.early_stop._target_", "ppo.early_stop.drop", "ppo.early_stop.patience",
                           "ppo.early_stop.window"]),
    (["model.fast_cpu=false"], ["model.fast_cpu"]),  # equal up to rounding alone
    (["trainer.precision=bf16-mixed"], ["trainer.precision"]),
])  # fmt: skip
def test_what_changes_results_is_named_where_it_was_written_and_refused(
    overrides: list[str], keys: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, configured(tmp_path))
    now = configured(tmp_path, *overrides)
    content = plain_config(now)
    unsafe = [key for key in changed_keys(plain_config(configured(tmp_path)), content) if not may_change(key, content)]
    assert set(keys) <= set(unsafe) if keys else unsafe == []
    if keys:
        with pytest.raises(ConfigError, match=rf"{keys[0]} \(.* -> .*\).*allow_config_change=true") as refused:
            find_checkpoint(now, {})
        assert "\n" not in str(refused.value)
        assert find_checkpoint(configured(tmp_path, *overrides, "allow_config_change=true"), {}) == path
        assert find_checkpoint(configured(tmp_path, *overrides, "resume=never"), {}) is None
    else:
        assert find_checkpoint(now, {}) == path


@pytest.mark.parametrize("override", [
    "callbacks.checkpoint.every=1", "callbacks.checkpoint.best_metric=rollout/score", "ppo.samples.rows=3",
    "ppo.log_every=2", "logger=wandb", "ppo.eval_prompts=3", "ppo.micro_batch_size=4", "rollout.scoring_batch_size=4",
    "ppo.reward_timeout=3", "log_dir=elsewhere", "name=other", "trainer.enable_progress_bar=false",
    "callbacks.stop.grace_seconds=5", "model.path=other", "reward.path=other",
    "trainer.devices=2 trainer=ddp", "trainer.devices=4 trainer=fsdp",
])  # fmt: skip
def test_what_changes_no_result_is_taken_and_named(
    override: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "src")
    path = written(tmp_path, configured(tmp_path))
    written_out = "+" + override if "progress_bar" in override else override
    assert find_checkpoint(configured(tmp_path, *written_out.split()), {}) == path
    key = override.split("=")[0]
    (said,) = caplog.messages
    assert said.startswith(f"resuming from {path} with other settings: ")
    assert key in said


def test_what_is_said_to_cost_memory_alone_reaches_passes_alone(tmp_path: Path) -> None:
    """Not the batches of the comparison, which have draws of their own: its figures would be others."""
    plain, small = (PPOStage(configured(tmp_path, *given)) for given in ((), ("rollout.scoring_batch_size=4",)))
    assert (plain.maker.fitting.size, small.maker.fitting.size) == (plain.run.rollout.scoring_batch_size, 4)
    data = [stage.prompt_data(TinyCorpus(), tokenizer(), 8) for stage in (plain, small)]
    assert [kept.eval_batch_size for kept in data] == [plain.run.ppo.batch_size] * 2
    updates = [settings_of(configured(tmp_path, *given)) for given in ((), ("ppo.micro_batch_size=4",))]
    assert updates[1] == replace(updates[0], micro_batch_size=4)


def test_what_begins_afresh_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "src")
    written(tmp_path, configured(tmp_path))
    other = ("kl_controller=adaptive", "policy_loss=kl_penalty")
    find_checkpoint(configured(tmp_path, *other, "allow_config_change=true"), {})
    (said,) = caplog.messages
    assert said.endswith("; ppo.kl_controller, ppo.old_kl_controller start without the state that the checkpoint lacks")
    find_checkpoint(configured(tmp_path, "ppo.clip=0.3", "allow_config_change=true"), {})
    assert "start without" not in caplog.messages[1]


def test_a_stage_may_be_lengthened_where_the_learning_rate_does_not_depend_on_its_length(tmp_path: Path) -> None:
    constant = "ppo.lr_schedule=constant_with_warmup"
    path = written(tmp_path / "constant", configured(tmp_path / "constant", constant))
    assert find_checkpoint(configured(tmp_path / "constant", constant, "ppo.num_iterations=300"), {}) == path
    written(tmp_path / "linear", configured(tmp_path / "linear"))
    with pytest.raises(ConfigError, match=r"ppo.num_iterations \(\d+ -> 300\)"):
        find_checkpoint(configured(tmp_path / "linear", "ppo.num_iterations=300"), {})


@pytest.mark.parametrize(("length", "finished", "refused"), [(5, 5, True), (4, 5, True), (6, 5, False), (8, 8, False)])
def test_a_stage_is_not_shortened_to_what_is_finished(
    length: int, finished: int, refused: bool, tmp_path: Path
) -> None:
    """Of 8 iterations; Lightning would train the shorter length from its beginning, from the weights of its end."""
    constant = "ppo.lr_schedule=constant_with_warmup"
    progress = {"epoch_loop.batch_progress": {"total": {"ready": finished}}}
    whole = configured(tmp_path, constant, "ppo.num_iterations=8")
    path = written(tmp_path, whole, finished, loops={"fit_loop": progress})
    now = configured(tmp_path, constant, f"ppo.num_iterations={length}")
    if not refused:
        assert find_checkpoint(now, {}) == path
        return
    with pytest.raises(ConfigError, match=rf"^ppo.num_iterations={length}: .* was planned for 8 and has finished 5"):
        find_checkpoint(now, {})


def test_a_key_that_may_change_hides_none_that_may_not(tmp_path: Path) -> None:
    """Both are called `every` and change alike."""
    measured = ["ppo.held_out.every=20", "ppo.samples.every=20"]
    written(tmp_path, configured(tmp_path, *measured))
    with pytest.raises(ConfigError, match=r"these change results: ppo.held_out.every \(20 -> 10\);"):
        find_checkpoint(configured(tmp_path, "ppo.held_out.every=10", "ppo.samples.every=10"), {})


def test_of_several_ranks_one_sets_a_damaged_checkpoint_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another has renamed it between the look at it and the renaming."""
    kept, torn = (written(tmp_path, configured(tmp_path), number) for number in (3, 4))
    torn.write_bytes(torn.read_bytes()[:-1])
    rename = Path.rename

    def by_both(path: Path, target: Path) -> Path:
        rename(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", by_both)
    with pytest.warns(UserWarning, match="iteration-4.ckpt .* damaged"):
        assert find_checkpoint(configured(tmp_path), {}) == kept
    assert torn.with_suffix(".damaged").exists()


def test_a_path_is_a_checkpoint_or_a_run_folder_until_the_run_has_its_own(tmp_path: Path) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    older, newer = (written(other, configured(other), number) for number in (9, 10))
    from_file = configured(mine, f"resume={older}")
    assert find_checkpoint(from_file, {}) == older
    for folder in (other, other / "checkpoints"):
        assert find_checkpoint(configured(mine, f"resume={folder}"), {}) == newer
    with pytest.raises(ConfigError, match=r"ppo.clip \(0.2 -> 0.3\)"):
        find_checkpoint(configured(mine, f"resume={older}", "ppo.clip=0.3"), {})
    own = written(mine, from_file, 12)
    assert find_checkpoint(from_file, {}) == own
    with pytest.raises(ConfigError, match=r"resume \(.*iteration-9.ckpt -> None\)"):
        find_checkpoint(configured(mine), {})  # the folder was not begun by this command
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in that folder"):
        find_checkpoint(configured(tmp_path / "new", f"resume={tmp_path / 'empty'}"), {})
    older.write_bytes(older.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(configured(tmp_path / "new", f"resume={older}"), {})


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
        find_checkpoint(configured(tmp_path), {})


def test_leaves_are_all_that_holds_no_keys() -> None:
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_models_that_a_run_made_for_itself_are_no_other_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint knows their folders; the same command comes to them later."""
    caplog.set_level("INFO", "src")
    path = written(tmp_path, configured(tmp_path, "model.path=made", "reward.path=made"))
    assert find_checkpoint(configured(tmp_path), {}) == path
    assert caplog.messages == [f"resuming from {path}"]


def test_a_run_one_step_behind_keeps_its_length(tmp_path: Path) -> None:
    """After the last iteration no batch waits, which a longer run would have learned from."""
    schedule = "ppo.lr_schedule=constant_with_warmup"
    for lag, may in ((0, True), (1, False)):
        content = plain_config(configured(tmp_path, schedule, f"rollout.lag={lag}"))
        assert may_change("ppo.num_iterations", content) == may


def test_a_run_that_ends_with_its_best_policy_keeps_its_length(tmp_path: Path) -> None:
    """Its last checkpoint holds that policy, with the moments of a later one."""
    measured = ["ppo.lr_schedule=constant_with_warmup", "ppo.held_out.every=5"]
    for best, may in (("null", True), ("score", False)):
        content = plain_config(configured(tmp_path, *measured, f"ppo.held_out.best={best}"))
        assert may_change("ppo.num_iterations", content) == may
        assert may_change("ppo.stop_on_alarm", content) == may
