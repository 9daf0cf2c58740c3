"""Presets are what docs/presets.md says they are, outrank experiments, yield to the command line, and train."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from transformers import GPT2Config, LlamaConfig

from src.config.compose import compose, instantiate, leaves
from src.config.errors import CONF, explain
from src.config.validate import preflight
from src.errors import ConfigError
from src.pipeline import share_out
from src.runs.prerequisites import ensure
from tests.config.test_conf import EXPERIMENTS, NEEDS
from tests.tiny import FOREIGN_WARNINGS, fit, same_bits, snapshot, tokenizer, write_lm

pytestmark = FOREIGN_WARNINGS

PAGE = (CONF.parent / "docs/presets.md").read_text(encoding="utf-8")
PRESETS = sorted(path.stem for path in (CONF / "preset").glob("*.yaml") if path.stem != "none")


def table(preset: str) -> dict[str, Any]:
    """Key -> value, of the rows `| `key` | `value` | ...` in the preset's section."""
    _, _, rest = PAGE.partition(f"\n## {preset}\n")
    section = rest.split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\|", section, flags=re.MULTILINE)) - 2, "a row that cannot be read"
    return {key: yaml.safe_load(value) for key, value, _, _ in rows}


def written(preset: str) -> dict[str, Any]:
    """Key -> value, of the preset's file: the groups that it overrides and the keys that it sets."""
    content = OmegaConf.load(CONF / f"preset/{preset}.yaml")
    assert isinstance(content, DictConfig)
    entries = [next(iter(entry.items())) for entry in content.pop("defaults")]
    assert all(str(name).startswith("override /") for name, _ in entries)
    chosen = {str(name).removeprefix("override /"): choice for name, choice in entries}
    return chosen | {key: OmegaConf.select(content, key) for key in leaves(content)}


@cache
def composed(*overrides: str) -> DictConfig:
    config = compose(list(overrides))
    config.run_dir = "/tmp/never-written"
    return config


def value(config: DictConfig, key: str) -> Any:
    return config.choices[key] if key in config.choices else OmegaConf.select(config, key)


# ------------------------------------------------------------------------------------------------- what they say


def test_each_preset_has_a_section() -> None:
    assert sorted(re.findall(r"^## (\w+)$", PAGE, flags=re.MULTILINE)) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_the_page_and_the_file_hold_the_same(preset: str) -> None:
    """Both ways, and of the same type: 1 is no 1.0 and `none` no null."""
    said, done = table(preset), written(preset)
    assert {key: (type(x), x) for key, x in said.items()} == {key: (type(x), x) for key, x in done.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_line_has_its_source(preset: str) -> None:
    lines = (CONF / f"preset/{preset}.yaml").read_text(encoding="utf-8").splitlines()
    setting = [line for line in lines if re.match(r"^ +(- override )?[\w/]+: ", line)]
    assert len(setting) == len(written(preset))
    assert [line for line in setting if not re.search(r" # \S+", line)] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_outranks_every_experiment_and_recipe(preset: str, experiment: str, tmp_path: Path) -> None:
    """All of its table holds, and nothing in the configuration contradicts it."""
    config = composed(f"preset={preset}", experiment, *NEEDS.get(experiment, []))
    if config.model.path is not None:  # on the hub; preflight reads its configuration only
        small = GPT2Config() if config.model.name == "gpt2" else LlamaConfig(max_position_embeddings=4096)
        small.save_pretrained(tmp_path)
        config.model.path = str(tmp_path)
    assert {key: value(config, key) for key in table(preset)} == table(preset)
    preflight(config)


def test_there_is_something_to_outrank() -> None:
    """In the tests above a preset meets a recipe with other values of its keys."""
    plain = composed("experiment=sentiment")
    assert plain.ppo.lr != composed("preset=nplus").ppo.lr
    assert plain.ppo.critic_warmup != composed("preset=nplus").ppo.critic_warmup
    assert plain.choices.preset == "none"


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("preset=trlx ppo.lr=0.5", {"ppo.lr": 0.5, "ppo.critic_lr": 3e-5}),
        ("ppo.lr=0.5 preset=trlx", {"ppo.lr": 0.5}),
        ("preset=nplus lr_schedule=cosine", {"lr_schedule": "cosine", "ppo.lr": 3e-6}),
        ("preset=nplus kl_controller=adaptive", {"ppo.kl_coef": 0.05, "ppo.kl_target": 6.0}),
        ("preset=nplus value_loss=mse", {"value_loss": "mse", "ppo.value_clip": None}),
        # an option brings what it needs, and takes away what nothing reads then
        ("preset=trlx advantage=rloo rollout.samples_per_prompt=4", {"value_loss": "none", "ppo.lam": None}),
        ("preset=ppo_max kl=none", {"kl_controller": "none", "kl_estimator": "none", "ppo.kl_coef": None}),
        ("preset=instructgpt kl=loss", {"kl_estimator": "k2", "ppo.kl_coef": 0.02}),
        ("preset=instructgpt kl=loss kl_estimator=k3", {"kl_estimator": "k3"}),
        ("preset=trlx policy_loss=kl_penalty", {"old_kl_controller": "doubling", "ppo.clip": None}),
        ("preset=ppo_max missing_eos=set", {"missing_eos": "set", "ppo.missing_eos_score": -1.0}),
    ],
)  # fmt: skip
def test_the_command_line_outranks_a_preset(overrides: str, expected: dict[str, Any]) -> None:
    config = composed(*overrides.split())
    preflight(config)
    assert {key: value(config, key) for key in expected} == expected


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_another_stage_refuses_a_preset(stage: str) -> None:
    """Both where the configuration is composed and where Hydra composes it on its own."""
    sentence = f"preset=trlx: a preset holds values of PPO, which stage={stage} does not read: remove it"
    for overrides in (["preset=trlx", f"stage={stage}"], [f"stage={stage}", "seed=2", "preset=trlx"]):
        with pytest.raises(ConfigError) as refused:
            compose(overrides)
        assert str(refused.value) == sentence
    given = [f"stage={stage}", "preset=trlx"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as error:
        hydra.compose("train", given)
    assert explain(error.value, given) == sentence
    assert composed(f"stage={stage}", "preset=none").stage == stage


def test_an_unknown_preset_is_refused() -> None:
    options = ", ".join(sorted([*PRESETS, "none"]))
    with pytest.raises(ConfigError, match=f"preset=nope: there is no such option; the options are {options}"):
        compose(["preset=nope"])


def test_the_pipeline_hands_a_preset_to_ppo_alone() -> None:
    assert share_out(["preset=trlx", "seed=2"]) == {
        "sft": ["seed=2"],
        "reward": ["seed=2"],
        "ppo": ["preset=trlx", "seed=2"],
    }
    with pytest.raises(ConfigError, match="preset=nope: there is no such option"):
        share_out(["preset=nope"])


def test_a_preset_changes_no_model_that_a_run_trains_for_itself(tmp_path: Path) -> None:
    trained = []

    def pretend(config: DictConfig) -> dict[str, Any]:
        trained.append((config.stage, config.choices.preset))
        (Path(config.run_dir) / "model").mkdir(parents=True)
        (Path(config.run_dir) / "result.json").write_text("{}")
        return {}

    for preset in ("none", "trlx"):
        ensure(compose(["experiment=quick", f"preset={preset}", f"log_dir={tmp_path}"]), pretend)
    assert trained == [("sft", "none"), ("reward", "none")]


# ------------------------------------------------------------------------------------------------------ they train

BATCH, MINIBATCH, ITERATIONS = 8, 4, 2
SIZES = [
    *("model=tiny", "reward=length", "gold_reward=none", "experiment=none", "rollout.max_prompt_tokens=8"),
    *("rollout.max_new_tokens=4", "rollout.scoring_batch_size=8", "ppo.micro_batch_size=4"),
    *(f"ppo.num_iterations={ITERATIONS}", f"ppo.batch_size={BATCH}", f"ppo.minibatch_size={MINIBATCH}"),
]
# share of the peak rate in each of two iterations
SHARES = {"constant": [1.0, 1.0], "linear": [1.0, 0.5], "constant, warmed up over 10": [0.0, 0.1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("lm"))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_trains_with_its_own_values(preset: str, folder: str, tmp_path: Path) -> None:
    """Two iterations on a tiny model: what is logged is what the table says."""
    config = compose([f"preset={preset}", f"model.path={folder}", *SIZES])
    module = instantiate(config.module)(tokenizer=tokenizer())
    policy, critic = module.roles.policy_parameters(), module.roles.critic_parameters()
    before = snapshot(policy), snapshot(critic)
    recorder, _ = fit(module, tmp_path, maker=instantiate(config.checks.maker), iterations=ITERATIONS)
    assert not same_bits(before[0], policy)
    assert not same_bits(before[1], critic)
    assert all(torch.isfinite(parameter).all() for parameter in [*policy, *critic])

    said, rows = table(preset), recorder.by_step()
    schedule = said.get("lr_schedule", "linear") + (", warmed up over 10" if said.get("ppo.warmup") else "")
    for role, key in {"policy": "ppo.lr", "critic": "ppo.critic_lr"}.items():
        peak = said.get(key, config.ppo.lr)
        for step, share in enumerate(SHARES[schedule], start=1):
            assert rows[step][f"{role}/lr"] == pytest.approx(peak * share)
    for row in rows.values():
        assert row["rollout/kl_coef"] == pytest.approx(said["ppo.kl_coef"])
        assert row["train/optimizer_steps"] == said["ppo.epochs"] * BATCH / MINIBATCH
        assert ("policy/lm_loss" in row) == (said["ppo.ptx_coef"] > 0)
