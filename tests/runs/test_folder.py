"""Run folders: the same command finds its folder again, and a folder can be given on the command line."""

from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from src.config.compose import compose
from src.errors import ConfigError
from src.runs.folder import make_folder, name_of, own_folder, run_folder
from src.runs.start import start as run


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "default"),
        (["stage=sft", "resume=never", "log_dir=x", "name=y"], "default"),
        (["seed=2", "ppo.clip=0.1"], "ppo.clip-0.1_seed-2"),
        (["ppo.clip=0.1", "seed=2"], "ppo.clip-0.1_seed-2"),
        (["model.path=/a/b/model"], "model.path-model-f70c655e"),
        (["ppo.lr=1e-5", "+x.y=1"], "+x.y-1_ppo.lr-1e-5"),
    ],
)
def test_a_name_says_what_was_asked_for(overrides, name):
    assert name_of(overrides) == name


def test_names_of_different_overrides_differ():
    names = [["x=a/b"], ["x=a-b"], ["x=a b"], ["x=[a,b]"], ["x=[a_b]"], [f"x={'a' * 200}"], [f"x={'a' * 201}"]]
    assert len({name_of(overrides) for overrides in names}) == len(names)
    assert all(len(name_of(overrides)) <= 80 for overrides in names)


def test_a_folder_can_be_the_value_of_an_override(tmp_path):
    folder = run_folder(tmp_path, None, ["ppo.clip=0.1", "model.lora.targets=[a,b]"], "auto")
    assert compose([f"model.path={folder}"]).model.path == str(folder)


def test_an_unfinished_folder_is_gone_on_with(tmp_path):
    first = run_folder(tmp_path, "mine", [], "auto")
    assert first == tmp_path / "mine"
    first.mkdir()
    assert run_folder(tmp_path, "mine", [], "auto") == first
    second = run_folder(tmp_path, "mine", [], "never")
    assert second == tmp_path / "mine_run-2"
    (first / "result.json").write_text("{}")
    assert run_folder(tmp_path, "mine", [], "auto") == second
    second.mkdir()
    assert run_folder(tmp_path, "mine", [], "never") == tmp_path / "mine_run-3"
    assert run_folder(tmp_path, 5, [], "auto") == tmp_path / "5"  # name=5 is a number to Hydra


def test_make_folder_refuses_what_cannot_be_written(tmp_path):
    make_folder(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file/b")


def test_two_runs_never_share_a_folder(tmp_path):
    """The second is refused in one sentence, also within one process; after the first it may."""
    lock = own_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training there"):
        own_folder(tmp_path / "run")
    lock.release()
    own_folder(tmp_path / "run").release()


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path, monkeypatch):
    """While the error is still held by whoever caught it, as by the next job of a sweep."""

    def fail(*_, **__):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(RuntimeError, match="in the middle") as caught:
        run(["experiment=quick", "stage=sft", f"log_dir={tmp_path}", "name=mine"])
    own_folder(tmp_path / "sft" / "mine").release()
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("name", ["checkpoints", "samples", "model", "adapter", "nonfinite"])
def test_a_file_in_the_place_of_a_folder_is_named_before_anything_is_computed(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    with pytest.raises(ConfigError, match=rf"run/{name} is a file, and the run needs a folder of that name"):
        own_folder(tmp_path / "run")


def test_an_empty_result_is_none(tmp_path: Path) -> None:
    """As a power failure leaves it: the run is resumed, where a whole one has the next name."""
    folder = tmp_path / "default"
    folder.mkdir()
    (folder / "result.json").touch()
    assert run_folder(tmp_path, None, [], "auto") == folder
    (folder / "result.json").write_text("{}")
    assert run_folder(tmp_path, None, [], "auto") == tmp_path / "default_run-2"
