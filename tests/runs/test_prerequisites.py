"""Models that are trained when a run needs them: once, whole, and again only when something has changed."""

import multiprocessing
import time
from pathlib import Path

import pytest

from src.config.compose import compose
from src.runs import prerequisites as artifacts
from src.runs.prerequisites import ensure


def pretend(config):
    """Stand in for a training: leaves what a real one leaves, and a line in a common log."""
    folder = Path(config.run_dir)
    (folder / "model").mkdir(parents=True)
    with (Path(config.log_dir) / "trained").open("a") as file:
        file.write(f"{config.stage} {config.model.path}\n")
    time.sleep(0.2)
    (folder / "result.json").write_text("{}")
    return {}


def ensured(tmp_path, *overrides, train=pretend):
    config = compose(["experiment=quick", f"log_dir='{tmp_path}'", *overrides])
    ensure(config, train)
    return config


def trained(tmp_path):
    return [line.split()[0] for line in (tmp_path / "trained").read_text().splitlines()]


def test_what_is_lacking_is_trained_once(tmp_path):
    config = ensured(tmp_path)
    assert trained(tmp_path) == ["sft", "reward"]
    assert Path(config.model.path).is_dir()
    assert Path(config.reward.path).is_dir()
    assert f"reward {config.model.path}" in (tmp_path / "trained").read_text()  # normalized on the SFT policy's samples
    again = ensured(tmp_path, "seed=2", "ppo.clip=0.1", "name=other")
    assert (again.model.path, again.reward.path) == (config.model.path, config.reward.path)
    assert trained(tmp_path) == ["sft", "reward"]


def test_what_is_given_is_not_trained(tmp_path):
    config = ensured(tmp_path, "model.path=mine", "reward=vader")
    assert config.model.path == "mine"
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_stages_ask_only_for_what_they_read(tmp_path, stage):
    ensured(tmp_path, f"stage={stage}")
    assert (trained(tmp_path) if stage == "reward" else []) == (["sft"] if stage == "reward" else [])


def test_another_configuration_has_another_key(tmp_path):
    first, other = ensured(tmp_path), ensured(tmp_path, "data.flip=0.2")
    assert first.model.path != other.model.path
    assert first.reward.path != other.reward.path
    another_model = ensured(tmp_path, "model.lora.rank=4")
    assert another_model.reward.path == first.reward.path  # the reward model is the experiment's own


@pytest.mark.parametrize("sign", ["+", "++"])
def test_a_key_with_a_sign_in_front_counts_for_what_is_trained_too(tmp_path, sign):
    """`++data.flip=0.2` is the data of SFT policy and reward model as much as PPO's; a model's key is the policy's."""
    plain = ensured(tmp_path, "data.flip=0.2", "model.lora.rank=4")
    signed = ensured(tmp_path, "++data.flip=0.2", "++model.lora.rank=4")
    assert (signed.model.path, signed.reward.path) == (plain.model.path, plain.reward.path)
    added = ensured(tmp_path, f"{sign}data.mine=1")
    assert added.model.path != ensured(tmp_path).model.path


def test_other_code_has_another_key(tmp_path, monkeypatch):
    config = compose(["experiment=quick", "stage=sft"])
    before = artifacts._key(config)
    assert artifacts._key(compose(["experiment=quick", "stage=sft", "log_dir=elsewhere", "name=x"])) == before
    monkeypatch.setattr(artifacts, "SOURCES", artifacts.SOURCES[:-1])
    assert artifacts._key(config) != before


def test_an_interrupted_training_leaves_no_half_artifact(tmp_path):
    def interrupted(config):
        (Path(config.run_dir) / "checkpoints").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensured(tmp_path, train=interrupted)
    (left,) = (path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    assert left.suffix == ".tmp"

    def goes_on(config):
        if config.stage == "sft":
            assert Path(config.run_dir) == left
            assert (left / "checkpoints").is_dir()
        return pretend(config)

    config = ensured(tmp_path, train=goes_on)
    assert Path(config.model.path).parent.name == left.stem
    assert not left.exists()


def test_two_processes_train_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=ensured, args=(tmp_path, f"seed={seed}")) for seed in (1, 2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert trained(tmp_path) == ["sft", "reward"]
