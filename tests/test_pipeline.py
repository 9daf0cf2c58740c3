"""The whole job in one command."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src import pipeline
from src.checkpointing.checksum import seal_models
from src.errors import ConfigError
from src.pipeline import compose_stages, run_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # peft, of GPT-2's Conv1D layers
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),  # Lightning, of very short runs
    pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning"),  # Lightning, of what is so by design
]

SMALL = ["experiment=quick", "trainer.accelerator=cpu", "sft.steps=4", "reward_model.steps=3", "ppo.num_iterations=1"]
SMALLER = ["sft.eval_rows=20", "reward_model.normalization_samples=16", "ppo.eval_prompts=8", "ppo.epochs=1"]


def test_each_override_goes_to_the_stages_that_read_it():
    given = ["sft.steps=4", "reward_model.lr=1e-3", "ppo.dual_clip=3.0", "policy_loss=dual_clip", "data.flip=0.0"]
    assert {stage: run.overrides[1:] for stage, run in compose_stages(given).items()} == {
        "sft": ["sft.steps=4", "data.flip=0.0"],
        "reward": ["reward_model.lr=1e-3", "data.flip=0.0"],
        "ppo": ["ppo.dual_clip=3.0", "policy_loss=dual_clip", "data.flip=0.0"],
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.stepss=3", "no key sft.stepss; close to it: sft.steps"),
        ("policy_loss=nope", "the options are cispo, clip, dual_clip, gspo"),
        ("ppo.dual_clip=3", "it belongs to policy_loss=dual_clip"),
        ("stage=sft", "the pipeline runs every stage"),
        ("nonsense", "cannot be read as key=value"),
    ],
)
def test_an_override_that_no_stage_takes_is_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        compose_stages([override])


def test_whatever_is_wrong_is_said_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "train", lambda run, stage: pytest.fail("a stage was run"))
    with pytest.raises(ConfigError, match=r"ppo\.clip=-1"):
        run_pipeline(["experiment=quick", "ppo.clip=-1", f"log_dir={tmp_path}"])


def test_with_another_reward_there_is_no_reward_stage(tmp_path, monkeypatch):
    stages = []

    def pretend(run, stage):
        stages.append((run.stage, run.model.path))
        Path(run.run_dir).mkdir(parents=True)
        return {"stage": run.stage, "sft": {"nll_per_token": 1.0}}

    monkeypatch.setattr(pipeline, "train", pretend)
    result = run_pipeline(["experiment=quick", "reward=vader", f"log_dir={tmp_path}"])
    model = tmp_path / "pipeline/experiment-quick_reward-vader/sft/model"
    assert stages == [("sft", None), ("ppo", str(model))]
    assert "reward_model" not in result


@pytest.mark.slow
def test_a_finished_stage_is_not_taken_for_one_with_other_settings(tmp_path, monkeypatch, capsys):
    """Named before the first stage runs; the same settings, and what stages hand on, are no difference."""
    trained = []

    def pretend(run, stage):
        trained.append(run.stage)
        if run.stage == "ppo":
            raise TimeoutError
        folder = Path(run.run_dir)
        (folder / "model").mkdir(parents=True)
        seal_models(folder)
        OmegaConf.save(OmegaConf.create(run.plain()), folder / "config.yaml")
        (folder / "result.json").write_text("{}")
        return {}

    monkeypatch.setattr(pipeline, "train", pretend)

    def stages_of(*others):
        trained.clear()
        with pytest.raises(TimeoutError):
            run_pipeline(["experiment=quick", "name=mine", f"log_dir={tmp_path}", "sft.lr=1e-3", *others])
        return [*trained]

    assert stages_of() == ["sft", "reward", "ppo"]
    assert stages_of() == ["ppo"]
    assert stages_of("ppo.clip=0.1", "ppo.log_every=3") == ["ppo"]
    for others, words in (
        (["sft.lr=2e-3"], r"pipeline/mine/sft was finished with other settings: sft\.lr \(0\.001 -> 0\.002\); give"),
        (["sft.eval_rows=7"], r"mine/sft was .*: sft\.eval_rows \(\d+ -> 7\); give"),
        (["reward_model.steps=7"], r"mine/reward was .*: reward_model\.steps \(\d+ -> 7\); give"),
    ):
        trained.clear()
        with pytest.raises(ConfigError, match=words):
            run_pipeline(["experiment=quick", "name=mine", f"log_dir={tmp_path}", "sft.lr=1e-3", *others])
        assert trained == []
    capsys.readouterr()
    assert stages_of("sft.lr=2e-3", "allow_config_change=true") == ["ppo"]
    assert "although it was finished with other settings: sft.lr" in capsys.readouterr().out


def test_the_pipeline_runs_and_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    overrides = [
        *SMALL,
        *SMALLER,
        "name=all",
        f"log_dir='{tmp_path}/a=b,c'",  # a path is quoted wherever it is handed on
    ]
    result = run_pipeline(overrides)
    folder = tmp_path / "a=b,c/pipeline/all"
    assert result == json.loads((folder / "result.json").read_text())
    assert result["stage"] == "pipeline"
    assert {"sft", "ppo", "improvement", "reward_model", "seconds"} <= set(result)
    assert result["sft"]["nll_per_token"] > 0
    assert 0 <= result["reward_model"]["accuracy"] <= 1
    for stage in ("sft", "reward", "ppo"):
        assert (folder / stage / "model/config.json").is_file()
    (folder / "result.json").unlink()
    (folder / "ppo/result.json").unlink()
    trained = []
    train = pipeline.train
    monkeypatch.setattr(pipeline, "train", lambda run, stage: trained.append(run.stage) or train(run, stage))
    capsys.readouterr()
    again = run_pipeline(overrides)
    assert trained == ["ppo"]
    assert capsys.readouterr().out.count("finished before") == 2
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_a_share_is_said_with_its_interval_and_n() -> None:
    """Two of three of 24 pairs is no sure thing."""
    figures = {"accuracy": 0.625, "n": {"accuracy": 24}, "interval": {"accuracy": [0.406, 0.812]}}
    assert pipeline.written(figures, "accuracy") == "0.625 (0.406 to 0.812) of 24"
