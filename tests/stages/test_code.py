"""The code that a configuration names has fingerprints, and a run is not resumed with other code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from src.checkpointing.checksum import seal
from src.checkpointing.resume import find_checkpoint, plain_config
from src.config.compose import compose
from src.errors import ConfigError
from src.stages.builders import stage_of
from src.stages.code import OF_MODEL, code_of
from tests.tiny import write_lm

BODY = "def brevity(prompts, responses, metadata):\n    return [{} * len(r) for r in responses]\n"
MINE = ["reward=function", "reward.target=mine_rewards.brevity"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module that can be imported, and a second one that it takes names from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    (tmp_path / "mine_rewards.py").write_text(BODY.format(-1))
    (tmp_path / "mine_base.py").write_text("class Base:\n    def score(self, p, r, m): return [0.0] * len(r)\n")
    (tmp_path / "mine_class.py").write_text("from mine_base import Base\nclass Own(Base): ...\n")
    (tmp_path / "mine_names.py").write_text("from mine_rewards import brevity\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("mine_"):
            del sys.modules[name]


def of(*overrides: str) -> dict[str, str]:
    return code_of(compose(["stage=ppo", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "target", "edited"),
    [
        (MINE, "mine_rewards.brevity", "mine_rewards.py"),
        (["reward=function", "reward.target=mine_names.brevity"], "mine_names.brevity", "mine_rewards.py"),
        (["reward=function", "reward.target=mine_names.brevity"], "mine_names.brevity", "mine_names.py"),
        (["reward=mix", "+reward.parts.own._target_=mine_class.Own"], "mine_class.Own", "mine_base.py"),
        (["+callbacks.own._target_=mine_class.Own"], "mine_class.Own", "mine_class.py"),
    ],
)
def test_an_edited_file_changes_the_fingerprint_of_its_target_alone(
    overrides: list[str], target: str, edited: str, mine: Path
) -> None:
    """Of the file that is named, of the one in which it is written, and of a base class; at any depth."""
    before = of(*overrides)
    assert before == of(*overrides)
    assert set(before) > {target, "src.core.estimators.GAE"}
    (mine / edited).write_text((mine / edited).read_text() + "LATER = 1\n")
    changed = {name for name, digest in of(*overrides).items() if before[name] != digest}
    assert changed == {target}


def test_libraries_and_loggers_have_none(mine: Path) -> None:
    """Versions of libraries are compared instead; a logger makes no number."""
    found = of("+callbacks.own._target_=lightning.pytorch.callbacks.Timer", "+logger.own._target_=mine_class.Own")
    assert not [name for name in found if name.startswith(("lightning", "mine", "src.loggers"))]


def test_the_code_in_a_trusted_model_s_folder_counts(tmp_path: Path) -> None:
    path = write_lm(tmp_path / "model")
    given = ["model=gpt2", f"model.path={path}"]
    assert OF_MODEL not in of(*given)
    before = of(*given, "model.trust_remote_code=true")
    (tmp_path / "model/own.py").write_text("class Model: ...\n")
    after = of(*given, "model.trust_remote_code=true")
    assert {name for name in after if before[name] != after[name]} == {OF_MODEL}


def test_an_edited_reward_function_is_not_resumed_into_the_old_run(
    mine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named, with what to do; with allow_config_change=true it goes on and says so."""
    caplog.set_level("INFO", "src")
    runs = {extra: compose(["stage=ppo", *MINE, *extra]) for extra in ((), ("allow_config_change=true",))}
    runs = {extra: run.model_copy(update={"run_dir": str(mine / "run")}) for extra, run in runs.items()}
    stage = stage_of(runs[()])
    stage.check()
    path = mine / "run/checkpoints/iteration-3.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"format": 2, "run": {"config": plain_config(runs[()]), "code": stage.code}}, path.with_suffix(".tmp"))
    seal(path.with_suffix(".tmp"), path)
    assert find_checkpoint(runs[()], stage.code) == path
    assert caplog.messages == [f"resuming from {path}"]
    (mine / "mine_rewards.py").write_text(BODY.format(-2))
    assert find_checkpoint(runs[()], stage.code) == path  # what was imported before the edit is what runs
    stage = stage_of(runs[()])
    stage.check()
    with pytest.raises(ConfigError) as refused:
        find_checkpoint(runs[()], stage.code)
    assert str(refused.value) == (
        f"{path} was made with other code of mine_rewards.brevity, whose file has been edited since: restore it, or "
        f"allow_config_change=true to resume with the change, or resume=never to start again"
    )
    assert find_checkpoint(runs["allow_config_change=true",], stage.code) == path
    assert caplog.messages[-1] == f"resuming from {path} with other code: mine_rewards.brevity"
