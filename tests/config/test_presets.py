"""Presets are what docs/presets.md says they are, outrank experiments, yield to the command line, and train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from src.checkpointing.checksum import seal_models
from src.config.compose import compose
from src.config.files import CONF, brings, leaves, read
from src.errors import ConfigError
from src.pipeline import compose_stages
from src.runs.prerequisites import train_missing
from src.stages.ppo import PPOStage
from tests.config.composed import EXPERIMENTS, GROUPS, NEEDS, PRESETS, composed, value_of
from tests.tiny import FOREIGN_WARNINGS, TinyCorpus, fit, same_bits, snapshot, write_lm

pytestmark = FOREIGN_WARNINGS

PAGE = (CONF.parent / "docs/presets.md").read_text(encoding="utf-8")


def table(preset: str) -> dict[str, Any]:
    """Key -> value, of the rows `| `key` | `value` | ...` in the preset's section."""
    _, _, rest = PAGE.partition(f"\n## {preset}\n")
    section = rest.split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\|", section, flags=re.MULTILINE)) - 2, "a row that cannot be read"
    return {key: yaml.safe_load(value) for key, value, _, _ in rows}


def written(preset: str) -> dict[str, Any]:
    """Key -> value, of the preset's file: the groups that it overrides and the keys that it sets."""
    content = dict(read(CONF / f"preset/{preset}.yaml"))
    entries = [next(iter(entry.items())) for entry in content.pop("defaults")]
    assert all(str(name).startswith("override /") for name, _ in entries)
    return {str(name).removeprefix("override /"): choice for name, choice in entries} | dict(leaves(content))


# ------------------------------------------------------------------------------------------------- what they say


def test_each_preset_has_a_section() -> None:
    assert sorted(re.findall(r"^## (\w+)$", PAGE, flags=re.MULTILINE)) == PRESETS


def test_the_page_and_the_file_hold_the_same() -> None:
    """Both ways, and of the same type: 1 is no 1.0 and `none` no null. The page also names the groups that a chosen
    option brings along."""
    for preset in PRESETS:
        page, file = table(preset), written(preset)
        brought = {key: page.pop(key) for key in list(page) if key in brings()}
        assert {key: (type(x), x) for key, x in page.items()} == {key: (type(x), x) for key, x in file.items()}
        assert brought == {key: value_of(composed(f"preset={preset}"), key) for key in brought}
        assert {"kl_estimator", "kl_controller"} <= set(brought)


def test_each_line_has_its_source() -> None:
    for preset in PRESETS:
        lines = (CONF / f"preset/{preset}.yaml").read_text(encoding="utf-8").splitlines()
        setting = [line for line in lines if re.match(r"^ +(- override )?[\w/]+: ", line)]
        assert len(setting) == len(written(preset))
        assert [line for line in setting if not re.search(r" # \S+", line)] == []


def contrary(value: Any) -> Any:
    """Another value of the same key."""
    return (
        not value
        if isinstance(value, bool)
        else "cosine"
        if isinstance(value, str)
        else 7.5
        if value is None
        else value + 7
    )


def test_a_preset_outranks_an_experiment_that_contradicts_all_of_it(own_conf: Path) -> None:
    others = {"advantage": "rloo", "policy_loss": "reinforce", "kl": "none", "aggregation": "constant_length"}
    others |= {"score_scaling": "scale", "missing_eos": "subtract"}
    for preset in PRESETS:
        content: dict[str, Any] = {}
        for key, value in dict(leaves(dict(read(CONF / f"preset/{preset}.yaml")))).items():
            if key != "defaults":
                node, _, name = key.partition(".")
                content.setdefault(node, {})[name] = contrary(value)
        defaults = [{f"override /{group}": others[group]} for group in written(preset) if group in others]
        text = yaml.safe_dump({"defaults": defaults, **content})
        (own_conf / "experiment" / f"not_{preset}.yaml").write_text(f"# @package _global_\n{text}")
        run = compose([f"preset={preset}", f"experiment=not_{preset}"])
        assert {key: value_of(run, key) for key in table(preset)} == table(preset)


def test_a_preset_outranks_every_experiment() -> None:
    """All of its table holds, and nothing in the configuration contradicts it. Each experiment meets one of them."""
    for number, experiment in enumerate(EXPERIMENTS):
        preset = PRESETS[number % len(PRESETS)]
        run = composed(f"preset={preset}", experiment, *([NEEDS[experiment]] if experiment in NEEDS else []))
        assert {key: value_of(run, key) for key in table(preset)} == table(preset), experiment


def test_there_is_something_to_outrank() -> None:
    """In the test above a preset meets experiments and models with other values of its keys."""
    plain, preset = composed("experiment=sentiment"), composed("preset=nplus")
    for key in ("ppo.lr", "ppo.critic_lr", "ppo.critic_warmup", "ppo.batch_size", "rollout.temperature"):
        assert value_of(plain, key) != value_of(preset, key)
    assert plain.choices["preset"] == "none"


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("preset=trlx ppo.lr=0.5", {"ppo.lr": 0.5, "ppo.critic_lr": 3e-5}),
        ("ppo.lr=0.5 preset=trlx", {"ppo.lr": 0.5}),
        ("preset=nplus ppo.lr_schedule=cosine", {"ppo.lr_schedule": "cosine", "ppo.lr": 3e-6}),
        ("preset=nplus kl_controller=adaptive", {"ppo.kl_coef": 0.05, "ppo.kl_target": 6.0}),
        ("preset=nplus value_loss=mse", {"value_loss": "mse", "ppo.value_clip": None, "ppo.critic_lr": 3e-6}),
        # an option brings what it needs, and takes away what nothing reads then
        (f"preset=trlx advantage=rloo {GROUPS}", {"value_loss": None, "ppo.lam": None, "ppo.critic_warmup": None}),
        (f"preset=nplus advantage=rloo {GROUPS}", {"value_loss": None, "ppo.critic_lr": None, "ppo.lr": 3e-6}),
        ("preset=ppo_max kl=none", {"kl_controller": None, "kl_estimator": None, "ppo.kl_coef": None}),
        ("preset=instructgpt kl=loss", {"kl_estimator": "k2", "ppo.kl_coef": 0.02}),
        ("preset=instructgpt kl=loss kl_estimator=k3", {"kl_estimator": "k3"}),
        ("preset=trlx policy_loss=kl_penalty", {"old_kl_controller": "doubling", "ppo.clip": None}),
        ("preset=ppo_max missing_eos=set", {"missing_eos": "set", "ppo.missing_eos_score": -1.0}),
    ],
)  # fmt: skip
def test_the_command_line_outranks_a_preset(overrides: str, expected: dict[str, Any]) -> None:
    run = composed(*overrides.split())
    PPOStage(run).check()  # type: ignore[arg-type]
    assert {key: value_of(run, key) for key in expected} == expected


def test_another_stage_refuses_a_preset() -> None:
    for stage in ("sft", "reward"):
        for overrides in (["preset=trlx", f"stage={stage}"], [f"stage={stage}", "seed=2", "preset=trlx"]):
            with pytest.raises(ConfigError) as refused:
                compose(overrides)
            assert str(refused.value) == f"preset=trlx: stage={stage} does not read preset, only stage=ppo does"
        assert composed(f"stage={stage}").choices["preset"] == "none"


def test_an_unknown_preset_is_refused() -> None:
    options = ", ".join(sorted([*PRESETS, "none"]))
    with pytest.raises(ConfigError, match=f"preset=zzz: there is no such option; the options are {options}"):
        compose(["preset=zzz"])


def test_the_pipeline_hands_a_preset_to_ppo_alone() -> None:
    runs = compose_stages(["preset=trlx", "seed=2"])
    assert {stage: run.choices["preset"] for stage, run in runs.items()} == {
        "sft": "none", "reward": "none", "ppo": "trlx",
    }  # fmt: skip
    assert {run.seed for run in runs.values()} == {2}
    with pytest.raises(ConfigError, match="preset=nope: there is no such option"):
        compose_stages(["preset=nope"])


def test_a_preset_changes_no_model_that_a_run_trains_for_itself(tmp_path: Path) -> None:
    trained = []

    def pretend(run: Any) -> dict[str, Any]:
        trained.append((run.stage, run.choices["preset"]))
        (Path(run.run_dir) / "model").mkdir(parents=True)
        (Path(run.run_dir) / "result.json").write_text("{}")
        seal_models(Path(run.run_dir))
        return {}

    for preset in ("none", "trlx"):
        train_missing(compose(["experiment=quick", f"preset={preset}", f"log_dir={tmp_path}"]), pretend)
    assert trained == [("sft", "none"), ("reward", "none")]


# ------------------------------------------------------------------------------------------------------ they train

BATCH, MINIBATCH, ITERATIONS = 8, 4, 2
SIZES = [
    *("model=tiny", "reward=length", "gold_reward=none", "experiment=none", "rollout.max_prompt_tokens=8"),
    *("rollout.max_new_tokens=4", "rollout.scoring_batch_size=8", "ppo.micro_batch_size=4"),
    *(f"ppo.num_iterations={ITERATIONS}", f"ppo.batch_size={BATCH}", f"ppo.minibatch_size={MINIBATCH}"),
]
# share of the peak rate in each of two iterations
SHARES = {"constant_with_warmup": [1.0, 1.0], "linear": [1.0, 0.5], "warmed up over 10": [0.1, 0.2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("lm"))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_trains_with_its_own_values(preset: str, folder: str, tmp_path: Path) -> None:
    """Two iterations on a tiny model: what is logged is what the table says."""
    run = compose([f"preset={preset}", f"model.path={folder}", *SIZES])
    stage = PPOStage(run)  # type: ignore[arg-type]
    module, _ = stage.build(TinyCorpus(), tmp_path)
    policy, critic = module.roles.policy_parameters(), module.roles.critic_parameters()
    before = snapshot(policy), snapshot(critic)
    recorder, _ = fit(module, tmp_path, maker=stage.maker, iterations=ITERATIONS)
    assert not same_bits(before[0], policy)
    assert not same_bits(before[1], critic)
    assert all(torch.isfinite(parameter).all() for parameter in [*policy, *critic])

    said, rows = table(preset), recorder.by_step()
    schedule = "warmed up over 10" if said.get("ppo.warmup") else said.get("ppo.lr_schedule", "linear")
    for role, key in {"policy": "ppo.lr", "critic": "ppo.critic_lr"}.items():
        peak = said.get(key, value_of(run, "ppo.lr"))
        for step, share in enumerate(SHARES[schedule], start=1):
            assert rows[step][f"{role}/lr"] == pytest.approx(peak * share)
    for row in rows.values():
        assert row["rollout/kl_coef"] == pytest.approx(said["ppo.kl_coef"])
        assert row["train/optimizer_steps"] == said["ppo.epochs"] * BATCH / MINIBATCH
        assert ("policy/lm_loss" in row) == (said["ppo.ptx_coef"] > 0)


def test_a_preset_is_recorded_as_it_was_composed(tmp_path: Path) -> None:
    run = composed("preset=trlx")
    OmegaConf.save(OmegaConf.create(run.plain()), tmp_path / "config.yaml")
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == run.plain()
