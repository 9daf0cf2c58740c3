"""A checkpoint is whole or not there, shows damage, keeps its rows, and survives a full disk."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from src.checkpointing.checkpoint import BEST, IterationCheckpoint, checkpoints
from src.checkpointing.checksum import checksum_matches, damaged_models, seal, seal_models
from src.checkpointing.resume import newest_intact
from src.errors import CheckpointError, SettingError
from src.loggers.csv import CsvTables
from tests.tiny import FOREIGN_WARNINGS, fit, make_maker, make_module, make_roles, write_lm

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def sealed(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    seal(temporary, path)
    return path


def test_a_sealed_file_ends_in_its_checksum_and_is_read_as_before(tmp_path: Path) -> None:
    path = sealed(tmp_path / "a.ckpt", {"x": torch.arange(5)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    whole = path.read_bytes()
    assert whole[-32:] == hashlib.sha256(whole[:-39]).digest()
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(5))
    assert checksum_matches(path)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:-1], lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: whole[:39],
    lambda whole: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], lambda whole: whole[:-1] + b"\0\0",
    lambda whole: whole + b"\0",
])  # fmt: skip
def test_damage_is_seen(damage: Any, tmp_path: Path) -> None:
    path = sealed(tmp_path / "a.ckpt", {"x": torch.arange(100)})
    path.write_bytes(damage(path.read_bytes()))
    assert not checksum_matches(path)
    assert not checksum_matches(tmp_path / "none")


def test_the_newest_sound_checkpoint_is_taken_and_damaged_ones_are_named(tmp_path: Path) -> None:
    """Checklist 61. They are set aside, so that they do not count among the newest that are kept."""
    assert newest_intact(tmp_path, set_aside=True) is None
    for number in (1, 2, 10, 11):
        sealed(tmp_path / f"iteration-{number}.ckpt", {"number": number})
    for number in (10, 11):
        (tmp_path / f"iteration-{number}.ckpt").write_bytes(b"torn")
    for set_aside, left in ((False, 4), (True, 2)):
        with pytest.warns(
            UserWarning, match=r"iteration-11.ckpt, iteration-10.ckpt .*iteration-2.ckpt is used instead"
        ):
            assert newest_intact(tmp_path, set_aside=set_aside) == tmp_path / "iteration-2.ckpt"
        assert len(checkpoints(tmp_path)) == left
    for number in (1, 2):
        (tmp_path / f"iteration-{number}.ckpt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* can be read .*resume=never"):
        newest_intact(tmp_path, set_aside=True)
    assert len(checkpoints(tmp_path)) == 2


class Say(Callback):
    """Logs chosen values of a number, one per iteration."""

    def __init__(self, values: list[float], name: str = "mine") -> None:
        self.values, self.name = values, name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log(self.name, self.values[batch_idx], batch_size=1)


@pytest.mark.parametrize(("mode", "values", "kept"), [
    ("max", [1.0, 4.0, 4.0, 3.0, 2.0], 2), ("min", [5.0, 4.0, 1.0, float("nan"), 2.0], 3),
])  # fmt: skip
def test_the_best_checkpoint_is_kept_too(base: str, mode: str, values: list[float], kept: int, tmp_path: Path) -> None:
    callback = IterationCheckpoint(str(tmp_path / "saved"), every=1, keep=1, best_metric="mine", best_mode=mode)
    module = make_module(make_roles(base), iterations=5)
    fit(module, tmp_path, maker=make_maker(), iterations=5, callbacks=(Say(values), callback))
    assert [path.stem for path in checkpoints(tmp_path / "saved")] == [f"iteration-{kept}", "iteration-5"]
    assert (tmp_path / "saved" / BEST).resolve().stem == f"iteration-{kept}"
    again = IterationCheckpoint(str(tmp_path / "saved"), every=1, keep=1, best_metric="mine", best_mode=mode)
    again.load_state_dict(callback.state_dict())
    assert again.best == callback.best == (kept, values[kept - 1])
    elsewhere = IterationCheckpoint(str(tmp_path / "other"), every=1, keep=1, best_metric="mine", best_mode=mode)
    elsewhere.load_state_dict(callback.state_dict())
    assert elsewhere.best is None


@pytest.mark.parametrize(("every", "values", "kept"), [
    (1, [9.0, 1.0, 4.0, 4.0, 3.0], 2),  # the third iteration measures the policy that two have made
    (2, [9.0, 9.0, 1.0, 9.0, 2.0], 4),  # of those that were saved, the fifth measures the better one
    (4, [1.0, 1.0, 1.0, 1.0, float("nan")], None),
])  # fmt: skip
def test_a_number_of_the_rollouts_judges_the_policy_that_wrote_them(
    base: str, every: int, values: list[float], kept: int | None, tmp_path: Path
) -> None:
    """Iteration N + 1 measures the policy after N iterations, and the last one is measured by nobody."""
    callback = IterationCheckpoint(str(tmp_path / "saved"), every=every, keep=1, best_metric="rollout/mine")
    module = make_module(make_roles(base), iterations=5)
    fit(module, tmp_path, maker=make_maker(), iterations=5, callbacks=(Say(values, "rollout/mine"), callback))
    best = [f"iteration-{kept}"] if kept else []
    assert [path.stem for path in checkpoints(tmp_path / "saved")] == [*best, "iteration-5"]
    assert callback.best == ((kept, values[kept]) if kept else None)
    assert (tmp_path / "saved" / BEST).exists() == bool(kept)


def test_a_best_metric_that_nobody_logs_is_refused(base: str, tmp_path: Path) -> None:
    callback = IterationCheckpoint(str(tmp_path), every=1, keep=1, best_metric="rollout/scores")
    with pytest.raises(SettingError, match="rollout/score"):
        fit(make_module(make_roles(base)), tmp_path, maker=make_maker(), callbacks=(callback,))
    with pytest.raises(SettingError, match="best_mode"):
        IterationCheckpoint("x", 1, 1, None, "highest")


class SayAtTimes(Say):
    """Logs a value after those iterations only that have one."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.values[batch_idx] is not None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def five_iterations(base: str, tmp_path: Path, *callbacks: Callback) -> None:
    module = make_module(make_roles(base), iterations=5)
    fit(module, tmp_path, maker=make_maker(), iterations=5, callbacks=callbacks)


def test_what_was_measured_before_says_nothing_of_a_later_policy(base: str, tmp_path: Path) -> None:
    """Measured after iterations 2 and 4: the third and fifth have the value of the policy before theirs, and lose."""
    callback = IterationCheckpoint(str(tmp_path / "saved"), every=1, keep=1, best_metric="held_out/mine")
    say = SayAtTimes([None, 3.0, None, 1.0, None], "held_out/mine")  # type: ignore[list-item]
    five_iterations(base, tmp_path, say, callback)
    assert callback.best == (2, 3.0)
    assert [path.stem for path in checkpoints(tmp_path / "saved")] == ["iteration-2", "iteration-5"]
    late = IterationCheckpoint(str(tmp_path / "late"), every=3, keep=1, best_metric="held_out/mine")
    five_iterations(base, tmp_path, say, late)
    assert (late.best, late.saved) == (None, 5)


def test_a_number_of_ones_own_may_be_logged_when_a_checkpoint_is_due(base: str, tmp_path: Path) -> None:
    callback = IterationCheckpoint(str(tmp_path / "saved"), every=3, keep=1, best_metric="mine")
    say = SayAtTimes([None, None, 3.0, None, None])  # type: ignore[list-item]
    five_iterations(base, tmp_path, say, callback)
    assert callback.best == (3, 3.0)


class FullDisk(Callback):
    """From the second iteration on no file can be longer than a few kilobytes."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_checkpoint_before_it(base: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    callback = IterationCheckpoint(str(tmp_path / "saved"), every=1, keep=1)
    try:
        with pytest.raises(CheckpointError, match=r"iteration-2.ckpt could not .*iteration-1.ckpt is kept as it was"):
            fit(make_module(make_roles(base)), tmp_path, maker=make_maker(), callbacks=(FullDisk(), callback))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["iteration-1.ckpt"]
    assert checksum_matches(tmp_path / "saved/iteration-1.ckpt")


def test_a_checkpoint_holds_the_row_of_its_own_iteration(base: str, tmp_path: Path) -> None:
    """Checklist 61. Lightning logs it later; a kill in between must not lose it."""
    tables, seen = CsvTables(str(tmp_path)), {}

    class Look(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            seen[trainer.fit_loop.total_batch_idx + 1] = list(checkpoint["tables"]["metrics"])

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.loggers = [*trainer.loggers, tables]

    callback = IterationCheckpoint(str(tmp_path / "saved"), every=1, keep=1)
    fit(make_module(make_roles(base)), tmp_path, maker=make_maker(), callbacks=(callback, Look()))
    assert seen == {1: [1], 2: [1, 2]}
    state = torch.load(checkpoints(tmp_path / "saved")[-1], weights_only=True)["tables"]
    other = CsvTables(str(tmp_path / "other"))
    other.log_metrics({"late": 1.0}, 7)
    other.load_state_dict(state)
    assert (tmp_path / "other/metrics.csv").read_bytes() == (tmp_path / "metrics.csv").read_bytes()


def test_the_models_of_a_run_are_sealed_file_by_file(tmp_path: Path) -> None:
    """As `sha256sum -c` reads it; a file that came later is no damage, and a folder without the list has none."""
    for name in ("model/model.safetensors", "model/sub/tokenizer.json", "adapter/adapter_config.json", "samples/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
    assert damaged_models(tmp_path) == []
    seal_models(tmp_path)
    assert damaged_models(tmp_path) == []
    lines = (tmp_path / "checksums.txt").read_text().splitlines()
    expected = hashlib.sha256(b"model/model.safetensors" * 1000).hexdigest()
    assert f"{expected}  model/model.safetensors" in lines
    assert [line.split("  ")[1] for line in lines] == [
        "adapter/adapter_config.json", "model/model.safetensors", "model/sub/tokenizer.json",
    ]  # fmt: skip
    (tmp_path / "model/later").touch()
    assert damaged_models(tmp_path) == []
    content = bytearray((tmp_path / "model/model.safetensors").read_bytes())
    content[777] ^= 1
    (tmp_path / "model/model.safetensors").write_bytes(content)
    (tmp_path / "adapter/adapter_config.json").unlink()
    assert damaged_models(tmp_path) == ["adapter/adapter_config.json", "model/model.safetensors"]
