"""Lengths that the model cannot read: the override that mends them, in the stage that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.checkpointing.checksum import seal_models
from src.config.compose import compose
from src.config.schema import Run
from src.errors import ConfigError, ModelError
from src.stages.builders import stage_of
from tests.tiny import write_lm


def refusal(run: Run) -> str:
    with pytest.raises(ConfigError) as refused:
        stage_of(run).check()
    return str(refused.value)


def test_the_override_is_named_and_mends_it(tmp_path: Path) -> None:
    lm = f"model.path={write_lm(tmp_path / 'lm')}"  # reads 48 tokens
    for given, mend in (
        (["stage=sft", "sft.max_tokens=49"], "sft.max_tokens=48"),
        (["rollout.max_prompt_tokens=40", "rollout.max_new_tokens=9", "reward=vader"], "rollout.max_new_tokens=8"),
        (["stage=reward", "reward_net=adapter", "reward_model.max_tokens=49"], "reward_model.max_tokens=48"),
    ):
        overrides = ["experiment=none", "model=gpt2", lm, *given]
        assert refusal(compose(overrides)).endswith(f"; give {mend}")
        stage_of(compose([*overrides, mend])).check()
    overrides = ["experiment=none", "model=gpt2", lm, "reward=vader", "rollout.max_prompt_tokens=48"]
    assert refusal(compose(overrides)).endswith("; give a smaller rollout.max_prompt_tokens")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["ppo.held_out.best=score"], "ppo.held_out.best='score': needs ppo.held_out.every"),
        (["ppo.held_out.patience=2"], "ppo.held_out.patience=2: needs ppo.held_out.every"),
        (
            ["ppo.held_out.every=3", "ppo.log_every=2"],
            "ppo.held_out.every=3: must be a multiple of ppo.log_every",
        ),
        (
            ["ppo.held_out.every=2", "ppo.held_out.best=-gold", "gold_reward=none"],
            r"ppo.held_out.best='-gold': needs a gold",
        ),
    ],
)
def test_a_measurement_that_would_be_lost_is_refused(given: list[str], message: str, tmp_path: Path) -> None:
    run = compose(
        [
            "experiment=quick",
            "model=gpt2",
            f"model.path={write_lm(tmp_path / 'lm')}",
            "reward=vader",
            *given,
            "rollout.max_prompt_tokens=8",
            "rollout.max_new_tokens=8",
        ]
    )
    assert refusal(run).startswith(message)


def test_of_a_stage_that_another_needs_first_the_command_is_named(tmp_path: Path) -> None:
    """In the run that was asked for, nothing reads the override."""
    overrides = ["stage=sft", "experiment=none", "model=tiny", f"log_dir={tmp_path}"]
    run = compose(overrides).model_copy(update={"run_dir": str(tmp_path / "artifacts" / "sft-0.tmp")})
    wrong = "sft.max_tokens (512) may reach 512 tokens, but model 'tiny' reads at most 64"
    assert refusal(run) == (
        f"the SFT stage that this run needs first: {wrong}; train it with `python -m src.train {' '.join(overrides)} "
        f"sft.max_tokens=64`, then give model.path=FOLDER"
    )


def test_one_ratio_for_a_response_needs_one_weight_for_it() -> None:
    gspo = ["experiment=none", "reward=vader", "model=tiny", "policy_loss=gspo", "correction=truncate"]
    assert refusal(compose(gspo)).startswith("correction_level=token: policy_loss=gspo")
    stage_of(compose([*gspo, "correction_level=sequence"])).check()


def test_who_keeps_the_policy_that_sampled_must_still_have_it_one_step_behind() -> None:
    late = ["experiment=none", "reward=vader", "model=tiny", "rollout.lag=1"]
    stage_of(compose([*late, "correction=truncate"])).check()
    assert refusal(compose([*late, "early_stop=gold"])).startswith("rollout.lag=1: early_stop=gold keeps")
    keep = [*late, "callbacks.checkpoint.every=1", "callbacks.checkpoint.best_metric=rollout/score"]
    newest = "callbacks.checkpoint.keep=1"
    assert refusal(compose([*keep, newest])).startswith(f"{newest}: must be at least 2 with rollout.lag=1")
    for others in (
        [],
        [newest, "callbacks.checkpoint.every=2"],
        [newest, "callbacks.checkpoint.best_metric=policy/loss"],
    ):
        stage_of(compose([*keep, *others])).check()


def test_what_decides_which_policy_is_kept_is_one_and_is_measured() -> None:
    run = ["experiment=none", "reward=vader", "model=tiny", "ppo.num_iterations=30", "ppo.held_out.every=5"]
    best = "callbacks.checkpoint.best_metric=held_out/score"
    both = [*run, "ppo.held_out.best=score", "early_stop=gold", "gold_reward=vader"]
    assert refusal(compose(both)).startswith("ppo.held_out.best='score': early_stop=gold decides too")
    for others in ([], ["ppo.held_out.every=null"], ["callbacks.checkpoint.every=7"]):
        every = [] if others and "checkpoint" in others[0] else ["callbacks.checkpoint.every=10"]
        made = compose([*run, best, *every, *others])
        if not others:
            stage_of(made).check()
        else:
            said = "callbacks.checkpoint.best_metric='held_out/score': no iteration is both measured and saved"
            assert refusal(made).startswith(said)


def test_a_model_that_is_not_the_one_its_run_wrote_is_refused(tmp_path: Path) -> None:
    """One flipped bit, which no loader would see."""
    path = write_lm(tmp_path / "run/model")
    seal_models(tmp_path / "run")
    overrides = ["experiment=none", "model=gpt2", "reward=vader", "rollout.max_prompt_tokens=8"]
    run = compose([*overrides, "rollout.max_new_tokens=8", f"model.path={path}"])
    stage_of(run).check()
    file = tmp_path / "run/model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert refusal(run).startswith(f"model.path={path}: model/model.safetensors is not what the run wrote (by ")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_base_of_few_bits_without_its_package_is_refused(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded, with the command; the SFT stage trains plain weights and needs none."""
    monkeypatch.setattr("src.models.quantized_linear.find_spec", lambda name: None)
    lm = f"model.path={write_lm(tmp_path / 'lm')}"
    own = ["reward=vader", "rollout.max_prompt_tokens=8"] if stage == "ppo" else ["reward_model.max_tokens=48"]
    own = ["sft.max_tokens=48"] if stage == "sft" else own
    run = compose([f"stage={stage}", "experiment=none", "model=gpt2", lm, "model.quantize=nf4", *own])
    if stage == "sft":
        stage_of(run).check()
        assert stage_of(run).model.quantize is None
        return
    with pytest.raises(ModelError, match=r"needs the package bitsandbytes: pip install -e '\.\[quantize\]'"):
        stage_of(run).check()


def test_shards_of_few_bits_and_whole_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.models.quantized_linear.find_spec", lambda name: "there")
    given = ["experiment=none", "model=gpt2", f"model.path={write_lm(tmp_path / 'lm')}", "reward=vader"]
    message = refusal(compose([*given, "model.quantize=int8", "trainer=fsdp"]))
    assert message == "model.quantize='int8': trainer=fsdp cannot shard weights of few bits: use trainer=ddp, or null"
    with pytest.raises(ConfigError, match=r"model\.lora=null: must be an adapter's settings with quantize=nf4"):
        stage_of(compose([*given, "model.quantize=nf4", "model.lora=null"]))
