"""Models that are trained when a run needs them: once, whole, and again only when something has changed."""

import multiprocessing
import shutil
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from src.checkpointing.checksum import seal_models
from src.config.compose import compose
from src.runs import prerequisites
from src.runs.prerequisites import imported_files, train_missing


def pretend(run):
    """Stand in for a training: leaves what a real one leaves, and a line in a common log."""
    folder = Path(run.run_dir)
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").write_bytes(b"weights")
    seal_models(folder)
    with (Path(run.log_dir) / "trained").open("a") as file:
        file.write(f"{run.stage} {run.model.path}\n")
    time.sleep(0.2)
    (folder / "result.json").write_text("{}")
    return {}


def missing(tmp_path, *overrides, train=pretend):
    """The folders of the models that were trained for a run."""
    return train_missing(compose(["experiment=quick", f"log_dir='{tmp_path}'", *overrides]), train)


def trained(tmp_path):
    return [line.split()[0] for line in (tmp_path / "trained").read_text().splitlines()]


def test_what_is_lacking_is_trained_once(tmp_path):
    found = missing(tmp_path)
    assert trained(tmp_path) == ["sft", "reward"]
    assert Path(found["model"]).is_dir()
    assert Path(found["reward"]).is_dir()
    assert f"reward {found['model']}" in (tmp_path / "trained").read_text()  # normalized on the SFT policy's samples
    assert missing(tmp_path, "seed=2", "ppo.clip=0.1", "name=other") == found
    assert trained(tmp_path) == ["sft", "reward"]


def test_what_is_given_is_not_trained(tmp_path):
    assert missing(tmp_path, "model.path=mine", "reward=vader") == {}
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_stages_ask_only_for_what_they_read(tmp_path, stage):
    found = missing(tmp_path, f"stage={stage}")
    assert list(found) == ([] if stage == "sft" else ["model"])
    assert (trained(tmp_path) if stage == "reward" else []) == (["sft"] if stage == "reward" else [])


def test_another_configuration_has_another_key(tmp_path):
    first, other = missing(tmp_path), missing(tmp_path, "data.flip=0.2")
    assert first["model"] != other["model"]
    assert first["reward"] != other["reward"]
    another_model = missing(tmp_path, "model.lora.rank=4")
    assert another_model["reward"] == first["reward"]  # the reward model is the experiment's own


def copied_sources(tmp_path, monkeypatch):
    """A copy of src/ that the keys are made from, to be edited."""
    shutil.copytree(prerequisites.ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(prerequisites, "ROOT", tmp_path)
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("file", "retrained"),
    [
        ("core/advantages.py", set()),
        ("rollout/experience.py", set()),
        ("callbacks/progress.py", set()),
        ("modules/sft.py", {"sft"}),
        ("stages/sft.py", {"sft"}),
        ("core/preference.py", {"reward"}),
        ("rollout/sampling.py", {"reward"}),  # of the samples that normalize the scores
        ("models/vocab_head.py", {"sft", "reward"}),
        ("data/embedded/reviews.py", {"sft", "reward"}),  # named by the configuration alone
    ],
)
def test_a_stored_model_is_used_until_code_that_made_it_changes(tmp_path, monkeypatch, file, retrained):
    source = copied_sources(tmp_path, monkeypatch) / file
    runs = {stage: compose(["experiment=quick", f"stage={stage}"]) for stage in ("sft", "reward")}
    before = {stage: prerequisites._key(run) for stage, run in runs.items()}
    source.write_text(source.read_text() + "# a comment\n")
    assert {stage for stage, run in runs.items() if prerequisites._key(run) != before[stage]} == retrained


def test_where_a_run_lies_does_not_count():
    plain, named = compose(["stage=sft"]), compose(["stage=sft", "log_dir=elsewhere", "name=x", "sft.log_every=3"])
    assert prerequisites._key(named) != prerequisites._key(plain)  # a key of the stage counts, even log_every
    moved = compose(["stage=sft", "log_dir=elsewhere", "name=x"])
    assert prerequisites._key(moved) == prerequisites._key(plain)


def test_imports_are_followed_to_their_end():
    found = {str(path.relative_to(prerequisites.ROOT)) for path in imported_files({"src.modules.sft"})}
    assert {"src/modules/sft.py", "src/modules/supervised.py", "src/models/vocab_head.py", "src/types.py"} <= found
    assert not [name for name in found if name.startswith(("src/rollout", "src/config", "src/runs"))]


def test_an_interrupted_training_leaves_no_half_artifact(tmp_path):
    def interrupted(run):
        (Path(run.run_dir) / "checkpoints").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        missing(tmp_path, train=interrupted)
    (left,) = (path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    assert left.suffix == ".tmp"

    def resumes(run):
        if run.stage == "sft":
            assert Path(run.run_dir) == left
            assert (left / "checkpoints").is_dir()
        return pretend(run)

    found = missing(tmp_path, train=resumes)
    assert Path(found["model"]).parent.name == left.stem
    assert not left.exists()


def flip(folder):
    (folder / "model/model.safetensors").write_bytes(b"weighus")


SPOILT = {
    "a flipped bit": (flip, "model/model.safetensors is not what was written"),
    "a missing file": (lambda f: (f / "model/model.safetensors").unlink(), "model/model.safetensors is not what"),
    "no result": (lambda f: (f / "result.json").unlink(), "result.json is missing"),
    "no model": (lambda f: shutil.rmtree(f / "model"), "model is missing"),
    "no checksums": (lambda f: (f / "checksums.txt").unlink(), "checksums.txt is missing"),
    "spoilt checksums": (
        lambda f: (f / "checksums.txt").write_text("nonsense"),
        "checksums.txt is not what was written",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_stored_model_that_is_spoilt_is_set_aside_named_and_made_again(tmp_path, how, caplog):
    """Twice: the second one gets a name of its own. What depends on it is the same."""
    spoil, what = SPOILT[how]
    found = missing(tmp_path)
    stored = Path(found["model"]).parent
    for name in ("damaged", "damaged-2"):
        spoil(stored)
        caplog.clear()
        assert missing(tmp_path) == found
        (message,) = [text for text in caplog.messages if "kept as" in text]
        assert message.startswith(f"{stored}: {what}")
        assert message.endswith(f"it is kept as {stored}.{name}, and the model is trained again")
        assert (stored / "model/model.safetensors").read_bytes() == b"weights"
    assert trained(tmp_path) == ["sft", "reward", "sft", "sft"]


def test_a_link_to_a_spoilt_model_of_a_pipeline_is_removed_and_the_folder_kept(tmp_path):
    found = missing(tmp_path)
    stored, elsewhere = Path(found["model"]).parent, tmp_path / "pipeline"
    stored.rename(elsewhere)
    stored.symlink_to(elsewhere)
    flip(elsewhere)
    missing(tmp_path)
    assert not stored.is_symlink()
    assert (elsewhere / "model/model.safetensors").read_bytes() == b"weighus"


def test_a_command_that_waits_for_another_s_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "src")
    path, held = f"{Path(missing(tmp_path)['model']).parent}.lock", threading.Event()

    def hold():
        with FileLock(path):
            held.set()
            limit = time.monotonic() + 60
            while "waiting for another command" not in caplog.text and time.monotonic() < limit:
                time.sleep(0.01)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    missing(tmp_path)
    other.join()
    assert [text for text in caplog.messages if text.startswith("waiting for another command, which trains or checks")]


def test_two_processes_train_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=missing, args=(tmp_path, f"seed={seed}")) for seed in (1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert trained(tmp_path) == ["sft", "reward"]
