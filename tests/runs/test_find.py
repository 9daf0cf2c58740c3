"""Which runs count as finished before: those of the same settings and revision, that can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.checkpointing.checksum import seal_models
from src.config.compose import compose
from src.config.schema import Run
from src.errors import ConfigError
from src.runs.find import RunFolder, find_run, finished_before, load_config

GIVEN = ["experiment=quick", "reward=vader", "ppo.clip=0.1"]


def finish(folder: Path, run: Run, revision: str | None = "abc", **changes: Any) -> None:
    """A folder as a run leaves it; the model that was trained for it is filled in."""
    folder.mkdir(parents=True)
    content = run.model_copy(update={"model": run.model.model_copy(update={"path": "trained"})}).plain()
    OmegaConf.save(OmegaConf.create(content | changes), folder / "config.yaml")
    (folder / "model").mkdir()
    (folder / "result.json").write_text(json.dumps({"git_revision": revision, "code": {}}))


@pytest.fixture
def asked(tmp_path: Path) -> Run:
    return compose([*GIVEN, "name=mine", f"log_dir={tmp_path}"])


def test_the_same_settings_and_revision_count(asked: Run, tmp_path: Path) -> None:
    assert finished_before(asked, "abc", {}) is None
    finish(tmp_path / "ppo/mine", asked)
    found = finished_before(asked, "abc", {})
    assert found is not None
    assert found.folder == tmp_path / "ppo/mine"
    assert finished_before(asked, "another revision", {}) is None
    assert finished_before(asked, "abc", {"mine.f": "0"}) is None


@pytest.mark.parametrize("override", ["ppo.clip=0.2", "seed=7", "reward=learned", "resume=never", "model=gpt2"])
def test_other_settings_do_not(override: str, asked: Run, tmp_path: Path) -> None:
    finish(tmp_path / "ppo/mine", asked)
    assert finished_before(compose([*GIVEN, "name=mine", f"log_dir={tmp_path}", override]), "abc", {}) is None


@pytest.mark.parametrize("other", ["first", "second"])
def test_a_run_from_a_checkpoint_that_was_named_does_not(other: str, asked: Run, tmp_path: Path) -> None:
    finish(tmp_path / "ppo/mine", asked, resume=f"{other}.ckpt")
    assert finished_before(asked, "abc", {}) is None


@pytest.mark.parametrize(("file", "content"), [("config.yaml", "a: [1"), ("config.yaml", "a: 1"), ("result.json", "{")])
def test_what_cannot_be_read_is_passed_over(file: str, content: str, asked: Run, tmp_path: Path) -> None:
    """The next folder of the name is looked at."""
    finish(tmp_path / "ppo/mine", asked)
    finish(tmp_path / "ppo/mine_run-2", asked)
    (tmp_path / "ppo/mine" / file).write_text(content)
    found = finished_before(asked, "abc", {})
    assert found is not None
    assert found.folder == tmp_path / "ppo/mine_run-2"


SPOILT = ["", "a: [1", "a: 1", "[1, 2]", "stage: ppo\nchoices: 3\n", "stage: ${", "\x00", "{{ x }}"]


@pytest.mark.parametrize("content", SPOILT)
def test_a_spoilt_configuration_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is not the configuration of a run of this version$"):
        load_config(tmp_path / "config.yaml")


def test_a_run_without_its_model_has_not_finished(asked: Run, tmp_path: Path) -> None:
    finish(tmp_path / "ppo/mine", asked)
    (tmp_path / "ppo/mine/model").rmdir()
    assert finished_before(asked, "abc", {}) is None
    assert not RunFolder(tmp_path / "ppo/mine", asked).finished


def test_a_run_whose_model_is_not_the_one_it_wrote_is_refused(asked: Run, tmp_path: Path) -> None:
    """By chat, evaluate and export."""
    finish(tmp_path / "run", asked)
    (tmp_path / "run/model/model.safetensors").write_bytes(b"weights")
    seal_models(tmp_path / "run")
    found = find_run(str(tmp_path / "run"))
    assert found is not None
    assert found.finished
    (tmp_path / "run/model/model.safetensors").write_bytes(b"weighty")
    with pytest.raises(ConfigError, match=r"run: model/model\.safetensors is not what the run wrote"):
        find_run(str(tmp_path / "run"))


def test_a_spoilt_result_is_one_sentence_and_an_empty_one_is_none(asked: Run, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, asked)
    for content in ("{", "[1]", "3"):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ConfigError, match=r"result\.json is spoilt: remove it, and the command that trained"):
            run.result()
    (tmp_path / "result.json").write_text("")
    assert run.result() == {}
