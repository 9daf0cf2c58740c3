"""The choice of a reward model on the command line: stages, what is handed on, what is trained unasked, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src import pipeline
from src.checkpointing.checksum import seal_models
from src.config.compose import compose
from src.errors import ConfigError, ModelError
from src.evaluate.prompts import load_rewards
from src.pipeline import compose_stages, run_pipeline
from src.rewards.learned import LearnedReward
from src.runs.find import load_config
from src.runs.prerequisites import train_missing
from src.stages.builders import stage_of
from src.stages.ppo import PPOStage
from tests.models.architectures import write
from tests.test_pipeline import SMALL, SMALLER, pytestmark  # noqa: F401  (the same warnings)

ON_BASE = ["reward_net=adapter", "reward=adapter"]


def check(*overrides: str) -> None:
    stage_of(compose(["experiment=quick", *overrides])).check()


def test_the_choice_of_a_model_is_the_reward_adapters_too() -> None:
    """It sits on that model."""
    given = ["model.lora.rank=4", "reward_net=adapter", "reward_model.net.lora.rank=2"]
    assert compose_stages(given)["reward"].overrides == ["stage=reward", *given]


@pytest.mark.slow
def test_four_roles_run_on_one_base_in_one_command(tmp_path: Path) -> None:
    """SFT -> reward adapter -> PPO. The adapter fits the base, and PPO's figures are those of that adapter."""
    result = run_pipeline([*SMALL, *SMALLER, *ON_BASE, "name=four", f"log_dir={tmp_path}"])
    folder = tmp_path / "pipeline/four"
    assert 0 <= result["reward_model"]["accuracy"] <= 1
    for file in ("adapter/reward.json", "adapter/adapter_model.safetensors", "model/model.safetensors", "reward.png"):
        assert (folder / "reward" / file).is_file()
    facts = json.loads((folder / "reward/adapter/reward.json").read_text())
    assert set(facts) == {"format", "base", "tokenizer", "bias"}
    assert facts["bias"] != 0
    chosen: Any = load_config(folder / "ppo/config.yaml")
    assert (chosen.reward.path, chosen.choices["reward"]) == (str(folder / "reward"), "adapter")
    saved = torch.load(next((folder / "ppo/checkpoints").glob("*.ckpt")), weights_only=True)
    assert not [name for name in saved["state_dict"] if ".reward." in name]
    scorer = load_rewards(PPOStage(chosen))["score"]  # for the finished policy, which shares no base any more
    assert isinstance(scorer, LearnedReward)
    plain = LearnedReward(str(folder / "reward/model"), 4).load().score(["The film"], [" was good."], [{}])
    assert torch.equal(scorer.score(["The film"], [" was good."], [{}]), plain)


def test_an_adapter_that_nobody_gave_is_trained_on_the_model_at_hand(tmp_path: Path) -> None:
    """And kept: another seed finds it; a reward model of its own is another artifact."""
    stages: list[Any] = []

    def pretend(run: Any) -> dict[str, Any]:
        stages.append((run.stage, run.choices["reward_net"] if run.stage == "reward" else None, run.model.path))
        (Path(run.run_dir) / "model").mkdir(parents=True)
        (Path(run.run_dir) / "result.json").write_text("{}")
        seal_models(Path(run.run_dir))
        return {}

    def missing(*overrides: str) -> dict[str, str]:
        return train_missing(compose(["experiment=quick", f"log_dir={tmp_path}", *overrides]), pretend)

    found = missing("reward=adapter")
    assert stages == [("sft", None, None), ("reward", "adapter", found["model"])]
    assert missing("reward=adapter", "seed=2") == found
    missing("reward=adapter", "model.path=mine")
    missing()
    assert stages[2:] == [("reward", "adapter", "mine"), ("reward", "scratch", found["model"])]


REFUSED = {
    "reward=adapter model.lora=null": "model.lora=null: policy and critic are whole models",
    "gold_reward=vader gold_reward._target_=nowhere.Reward": "gold_reward._target_",
    "stage=reward reward_model.lm_coef=0.1": "reward_net=scratch has no vocabulary head",
    "stage=reward reward_model.lm_coef=-1": "reward_model.lm_coef=-1: must be at least 0",
    "stage=reward reward_model.max_tokens=513": "the reward model reads at most 512 tokens",
    "stage=reward reward_net=adapter reward_model.max_tokens=65": "the reward model reads at most 64 tokens",
    "stage=reward reward_net=adapter reward_model.net.lora.targets=[nowhere]": "is called nowhere",
    "stage=reward reward_net=pretrained": "reward_model.net.path must be given with these choices",
    "stage=reward reward_model.net.lora.rank=2": "it belongs to reward_net=pretrained or reward_net=adapter",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_work_is_said_before_anything_is_loaded(given: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(*given.split())
    assert REFUSED[given] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pretrained_folder_is_looked_at_before_it_is_loaded(tmp_path: Path) -> None:
    """Its length, its layers, its vocabulary head, and whether it is there."""
    chosen = ["stage=reward", "reward_net=pretrained"]
    gpt2 = f"reward_model.net.path={write(tmp_path / 'gpt2', 'gpt2')}"
    bert = f"reward_model.net.path={write(tmp_path / 'bert', 'bert')}"
    check(*chosen, gpt2, "reward_model.max_tokens=48", "reward_model.lm_coef=0.1")
    lora = (
        "reward_model.net.lora={_target_:src.models.settings.LoraSettings,rank:2,alpha:2,dropout:0,targets:[nowhere]}"
    )
    for given, words in {
        (gpt2, "reward_model.max_tokens=49"): "reads at most 48 tokens",
        (bert, "reward_model.max_tokens=48", "reward_model.lm_coef=0.1"): "has no vocabulary head here",
        (gpt2, "reward_model.max_tokens=48", lora): r"reward_model\.net\.lora\.targets=\[nowhere\]: no layer",
    }.items():
        with pytest.raises(ConfigError, match=words):
            check(*chosen, *given)
    with pytest.raises(ModelError, match=r"reward_model\.net\.path"):
        check(*chosen, f"reward_model.net.path={tmp_path}/absent")


def test_a_reward_folder_without_an_adapter_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no reward adapter"):
        check("reward=adapter", f"reward.path={tmp_path}")


def test_without_an_adapter_in_ppo_the_reward_stage_is_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reward_net=adapter reward=learned: PPO reads the merged model of the run's folder."""
    given: list[Any] = []

    def pretend(run: Any, stage: Any) -> dict[str, Any]:
        given.append((run.stage, run.model.path, run.reward.path if run.stage == "ppo" else None))
        Path(run.run_dir).mkdir(parents=True)
        names = ("nll_per_token", "accuracy", "accuracy_all_pairs")
        figures = {
            "n": dict.fromkeys(names, 9),
            "interval": dict.fromkeys(names, (1.0, 1.0)),
            **dict.fromkeys(names, 1.0),
        }
        return {"stage": run.stage, "sft": figures, "reward_model": figures}

    monkeypatch.setattr(pipeline, "train", pretend)
    run_pipeline(["experiment=quick", "reward_net=adapter", "name=x", f"log_dir={tmp_path}"])
    folder = tmp_path / "pipeline/x"
    sft = str(folder / "sft/model")
    assert given == [("sft", None, None), ("reward", sft, None), ("ppo", sft, str(folder / "reward"))]
