"""Overrides in, the configuration of a run out: who outranks whom, what is dropped, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src import train
from src.config.compose import compose, readable_by, restored, settings_hash, with_value
from src.config.schema import PPORun, RewardRun, Run, SFTRun
from src.errors import ConfigError
from tests.config.composed import GROUPS, STAGES, composed, value_of

CRITIC = ("value_loss", "critic_lr", "critic_warmup", "value_clip", "lam", "critic_lam")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        compose(list(overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_each_stage_has_its_own_type() -> None:
    assert [type(composed(f"stage={stage}")).__mro__[1] for stage in STAGES] == [SFTRun, RewardRun, PPORun]
    assert type(composed()).__mro__[1] is PPORun


# ------------------------------------------------------------------------------------------- what reaches its reader


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("ppo.clip=0.3 ppo.clip_high=0.4 ppo.value_clip=0.5 ppo.lam=0.9 model.lora=null",
         {"ppo.policy_loss.clip_low": 0.3, "ppo.policy_loss.clip_high": 0.4, "ppo.value_loss.value_clip": 0.5,
          "ppo.advantage.critic_lam": 0.9, "model.lora": None}),
        ("policy_loss=dual_clip ppo.clip=0.3 ppo.dual_clip=4 kl_controller=adaptive ppo.kl_target=3",
         {"ppo.policy_loss.clip_low": 0.3, "ppo.policy_loss.clip_high": 0.3, "ppo.policy_loss.dual_clip": 4,
          "ppo.kl_controller.kl_target": 3}),
        ("missing_eos=subtract ppo.missing_eos_penalty=2 aggregation=constant_length rollout.max_new_tokens=7",
         {"ppo.missing_eos.missing_eos_penalty": 2, "ppo.aggregation.length": 7}),
        ("experiment=none model=gpt2 ppo.lr=1e-5 reward=function reward.target=math.fsum",
         {"ppo.critic_lr": 1e-5, "reward.function._target_": "math.fsum"}),
        ("experiment=quick", {"ppo.num_iterations": 4}),
        ("ppo.num_iterations=7 experiment=quick", {"ppo.num_iterations": 7}),  # the command line has the last word
        ("stage=sft model=gpt2 model.lora.rank=2", {"sft.lora.rank": 2}),
    ],
)  # fmt: skip
def test_a_value_reaches_its_reader(overrides: str, expected: dict[str, Any]) -> None:
    run = composed(*overrides.split())
    assert {key: value_of(run, key) for key in expected} == expected


def test_values_that_suit_a_model_come_with_it() -> None:
    """A model without values of its own has those of the stage, also under an experiment made for another model."""
    rates = {"tiny": (3e-3, 1e-3, 2e-3), "gpt2": (1e-4, 1e-4, 1e-4), "small": (2e-3, 2e-3, 2e-3)}
    for model, expected in rates.items():
        for experiment in ("sentiment", "quick") if model == "gpt2" else ("sentiment",):
            sft = composed("stage=sft", f"model={model}", f"experiment={experiment}")
            ppo = composed(f"model={model}", f"experiment={experiment}")
            assert (value_of(sft, "sft.lr"), value_of(ppo, "ppo.lr"), value_of(ppo, "ppo.critic_lr")) == expected
    assert value_of(composed("model=gpt2"), "ppo.num_iterations") == 50


@pytest.mark.parametrize("value", ["plain", "a=b,c", "it's", "two words", "/tmp/x=1,y=2/model"])
def test_with_value_quotes_anything(value: str) -> None:
    assert value_of(compose([with_value("model.path", value)]), "model.path") == value


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("data.path=数据/影评.jsonl", "数据/影评.jsonl"),
        ("name=测试 运行", "测试 运行"),
        ("name='已有引号'", "已有引号"),
        ("data.columns.prompt=Füße", "Füße"),
    ],
)
def test_values_in_any_script_need_no_quotes(given: str, read: str) -> None:
    """Hydra's own grammar knows letters of ASCII alone outside of quotes."""
    run = compose(["stage=sft", "data=custom", "data.path=x", given])
    assert value_of(run, given.split("=")[0]) == read


def test_a_sweep_may_give_several_values_and_settings_of_hydra() -> None:
    from src.config.errors import readable

    given = ["ppo.clip=0.1,0.2", "hydra/launcher=basic", "policy_loss=clip,dual_clip"]
    assert readable(given, sweep=True) == given
    for override in given:
        assert "only a sweep (-m) reads it" in refusal(override)


# ------------------------------------------------------------------------------------------------------- stages


def test_each_stage_reads_its_overrides() -> None:
    given = ["seed=2", "model=gpt2", "sft.steps=1", "reward_net=adapter", "ppo.clip=0.1", "preset=trlx", "reward=vader"]
    assert readable_by("sft", given) == ["seed=2", "model=gpt2", "sft.steps=1"]
    assert readable_by("reward", given) == ["seed=2", "model=gpt2", "reward_net=adapter"]
    assert readable_by("ppo", given) == ["seed=2", "model=gpt2", "ppo.clip=0.1", "preset=trlx", "reward=vader"]
    assert readable_by("sft", ["zzz=1", "+trainer.x=1"]) == ["zzz=1", "+trainer.x=1"]  # refused, or of the run as such


def test_what_another_stage_reads_is_refused() -> None:
    assert refusal("stage=sft", "ppo.clip=0.2") == (
        "ppo.clip=0.2: stage=sft does not read ppo.clip, only stage=ppo does"
    )
    assert "stage=sft does not read policy_loss, only stage=ppo does" in refusal("stage=sft", "policy_loss=clip")
    assert "stage=reward does not read rollout.temperature" in refusal("stage=reward", "rollout.temperature=1")
    assert "stage=ppo does not read reward_net, only stage=reward does" in refusal("reward_net=scratch")
    assert "ppo" not in composed("stage=sft").plain()
    assert {"sft", "reward_model", "reward"} & set(composed("stage=sft").plain()) == {"sft"}


# ------------------------------------------------------------------------------------------ what is dropped, and why


def test_a_value_falls_with_the_option_that_reads_it() -> None:
    """Of the model, the experiment and the preset: not of the command line, which is refused."""
    run = composed("experiment=sentiment", "advantage=rloo", GROUPS)
    assert {key: value_of(run, f"ppo.{key}") for key in CRITIC} == dict.fromkeys(CRITIC)
    assert composed("experiment=sentiment").ppo.critic_warmup == 3  # type: ignore[attr-defined]
    assert "value_clip" not in composed("value_loss=mse", "preset=trlx").plain()["ppo"]
    assert "nothing reads ppo.critic_lr here" in refusal("advantage=rloo", GROUPS, "ppo.critic_lr=0.1")
    assert "nothing reads ppo.value_clip here" in refusal("ppo.value_clip=1", "value_loss=mse")


def test_a_preset_with_an_estimator_without_a_critic_has_none_of_its_keys() -> None:
    """Composed for a run, or for --cfg job alone, which is the same."""
    run = composed("preset=nplus", "advantage=rloo", GROUPS)
    assert {key: value_of(run, f"ppo.{key}") for key in CRITIC} == dict.fromkeys(CRITIC)
    assert run.ppo.value_loss is None  # type: ignore[attr-defined]
    assert run.plain()["ppo"]["advantage"] == {"_target_": "src.core.estimators.LeaveOneOut"}
    assert "add rollout.samples_per_prompt=4" in refusal("preset=nplus", "advantage=rloo")


def test_what_an_experiment_sets_of_its_own_data_falls_with_them() -> None:
    """experiment=quick makes its embedded reviews few; other data have no such number, unless one is asked for."""
    own = ["data=custom", "data.path=rows.jsonl", "data.columns.prompt=q", "reward=vader"]
    assert "n_reviews" not in composed("experiment=quick", *own).plain()["data"]
    assert value_of(composed("experiment=quick"), "data.n_reviews") == 2400
    sentence = "data.n_reviews=4: nothing reads data.n_reviews here, it belongs to data=reviews"
    assert refusal("experiment=quick", *own, "data.n_reviews=4") == sentence


# --------------------------------------------------------------------------------------- experiments of the user's own


def test_an_experiment_that_builds_on_another_has_its_numbers(own_conf: Path) -> None:
    text = "# @package _global_\n# Mine.\ndefaults:\n  - sentiment\n  - _self_\n\nppo:\n  clip: 0.1\n"
    (own_conf / "experiment" / "mine.yaml").write_text(text)
    for stage in STAGES:
        mine, base = (compose([f"stage={stage}", f"experiment={name}"]).plain() for name in ("mine", "sentiment"))
        if stage == "ppo":
            assert mine["ppo"].pop("clip") == 0.1
            assert base["ppo"].pop("clip") == 0.2
            for name in ("clip_low", "clip_high", "policy_loss"):
                del mine["ppo"][name], base["ppo"][name]
            assert mine["ppo"]["num_iterations"] == 50
        for node in (mine, base):
            del node["overrides"], node["choices"]
        assert mine == base
    assert value_of(compose(["experiment=mine", "model=gpt2"]), "ppo.lr") == 1e-4


def test_an_experiment_that_builds_on_another_may_take_the_critic_away(own_conf: Path) -> None:
    text = (
        "# @package _global_\n# Mine.\ndefaults:\n  - sentiment\n  - override /advantage: rloo\n  - _self_\n\n"
        "rollout:\n  samples_per_prompt: 4\n"
    )
    (own_conf / "experiment" / "mine.yaml").write_text(text)
    run = compose(["experiment=mine"])
    assert {key: value_of(run, f"ppo.{key}") for key in CRITIC} == dict.fromkeys(CRITIC)
    assert value_of(run, "ppo.num_iterations") == 50
    again = compose(["experiment=mine", "advantage=gae"])  # the command line brings it back
    assert value_of(again, "ppo.critic_warmup") == 3
    (own_conf / "experiment" / "other.yaml").write_text(text + "ppo:\n  critic_warmup: 2\n")
    sentence = "ppo.critic_warmup, set by experiment=other: nothing reads ppo.critic_warmup here"
    assert sentence in refusal("experiment=other")


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("experiment/bad.yaml", "ppo:\n  clipp: 0.1\n",
         "ppo.clipp, set by experiment=bad: there is no key ppo.clipp; close to it: ppo.clip"),
        ("preset/bad.yaml", "ppo:\n  clipp: 0.1\n",
         "ppo.clipp, set by preset=bad: there is no key ppo.clipp; close to it: ppo.clip"),
        ("experiment/bad.yaml", "model:\n  lora:\n    r: 3\n",
         "model.lora.r, set by experiment=bad: there is no key model.lora.r; use model.lora.rank"),
        ("experiment/bad.yaml", "data:\n  columns:\n    prompt: q\n", "data.columns, set by experiment=bad: nothing"),
        ("experiment/bad.yaml", "trainer:\n  max_steps: 3\n",
         "trainer.max_steps=3: is not supported; the length of a stage is ppo.num_iterations"),
        ("experiment/bad.yaml", "ppo:\n  epochs: many\n", "ppo.epochs='many': must be a whole number"),
        ("experiment/bad.yaml", "ppo:\n  lr: null\n", "ppo.lr=null: must be a number"),
    ],
)  # fmt: skip
def test_what_no_chosen_part_reads_is_refused_with_the_name_of_its_file(
    own_conf: Path, path: str, text: str, sentence: str
) -> None:
    for group in ("experiment", "preset"):
        (own_conf / group / "bad.yaml").write_text("# @package _global_\n{}\n")
    (own_conf / path).write_text(f"# @package _global_\n{text}")
    assert sentence in refusal("experiment=bad", "preset=bad")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("override /model: nope",
         "model=nope: there is no such option; the options are digits, gpt2"),
        ("override /value_loss: mse", "experiment=bad chooses value_loss, which is part of advantage="),
        ("override /nope: x", "nope"),
    ],
)  # fmt: skip
def test_a_choice_of_an_experiment_that_cannot_be_is_refused(own_conf: Path, entry: str, sentence: str) -> None:
    (own_conf / "experiment" / "bad.yaml").write_text(f"# @package _global_\ndefaults:\n  - {entry}\n")
    assert sentence in refusal("experiment=bad", "advantage=rloo", GROUPS)


# ---------------------------------------------------------------------------------------------- what a run records


def test_what_is_printed_is_what_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides in ("", "stage=sft", "stage=reward", f"preset=nplus advantage=rloo {GROUPS} +trainer.benchmark=true"):
        monkeypatch.setattr("sys.argv", ["train", *overrides.split(), "--cfg", "job"])
        train.main()
        printed = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
        assert printed == composed(*overrides.split()).plain()


def test_a_configuration_is_restored_from_what_it_recorded() -> None:
    run = composed("preset=trlx", "ppo.lr=0.5")
    again = restored(run.plain())
    assert again.plain() == run.plain()
    assert [kind.__name__ for kind in type(again).__mro__] == [kind.__name__ for kind in type(run).__mro__]
    for broken in ({}, {"stage": "ppo"}, run.plain() | {"seed": "x"}, run.plain() | {"choices": {"advantage": "nope"}}):
        with pytest.raises((KeyError, ValueError)):
            restored(broken)


def test_the_hash_counts_what_is_learned_and_not_where() -> None:
    run = composed()
    same = ("log_dir=elsewhere", "name=mine", "resume=never", "allow_config_change=true")
    other = ("seed=2", "kl=loss", "kl=none", "reward=vader")
    assert settings_hash(composed(*same)) == settings_hash(run)
    assert len({settings_hash(run), *(settings_hash(composed(override)) for override in other)}) == len(other) + 1
    assert settings_hash(composed("kl=loss", "kl_estimator=k3")) != settings_hash(
        composed("kl=both", "kl_estimator=k3")
    )
    assert settings_hash(composed("logger=wandb"), "logger") == settings_hash(run, "logger") != settings_hash(run)


def test_a_configuration_does_not_change() -> None:
    run: Run = composed()
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]
    assert re.search(r"^\{'stage': 'ppo'", str(run.plain()))


def test_a_home_folder_is_spelled_out_where_no_shell_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    run = compose(["experiment=none", "model=tiny", "reward=learned", "model.path=~/sft/model", "reward.path=~/rm"])
    assert (run.model.path, run.reward.path) == ("/home/me/sft/model", "/home/me/rm")
    assert compose(["model=gpt2", "reward=vader"]).model.path == "openai-community/gpt2"
