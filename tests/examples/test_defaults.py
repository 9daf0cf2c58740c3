"""What Python leaves out is what the command line leaves out: each default is stated twice, and held equal here."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
import yaml

from src.core.aggregation import token_mean
from src.core.estimators import GAE
from src.core.kl import SampledKL, k1, k3
from src.core.policy_losses import ClippedSurrogate
from src.core.value_losses import ClippedSquaredError
from src.data.modules import PromptData
from src.models.settings import LoraSettings, ModelSettings
from src.modules.ppo import PPOModule
from src.modules.settings import PPOSettings
from src.rollout.experience import ExperienceMaker, ReferenceKL
from src.rollout.kl_controller import FixedKL
from src.rollout.sampling import Sampler
from src.rollout.shaping import NoScaling, SetMissingEos


def conf(name: str) -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parents[2] / "conf" / f"{name}.yaml").read_text(encoding="utf-8"))


PPO, ROLLOUT = conf("stages/ppo")["ppo"], conf("stages/ppo")["rollout"]


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def test_of_learning() -> None:
    given = PPO | {"temperature": ROLLOUT["temperature"], "critic_warmup": conf("value_loss/clipped")["critic_warmup"]}
    settings = dataclasses.asdict(PPOSettings())
    assert settings == {name: given[name] for name in settings}

    module, clip = defaults(PPOModule), conf("policy_loss/clip")["ppo"]["clip"]
    assert module["settings"] == PPOSettings()
    assert module["policy_loss"] == ClippedSurrogate(clip, clip)
    assert module["value_loss"] == ClippedSquaredError(conf("value_loss/clipped")["value_clip"])
    assert (module["old_kl"], module["aggregation"]) == (SampledKL(k3), token_mean)
    (group,) = module["policy_optimizer"]([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["eps"]) == (PPO["lr"], PPO["adam_eps"])


def test_of_experience() -> None:
    maker, gae = ExperienceMaker(), conf("advantage/gae")["ppo"]
    assert maker.sampler == Sampler(ROLLOUT["max_new_tokens"], ROLLOUT["temperature"])
    assert maker.fitting.given == ROLLOUT["scoring_batch_size"]
    assert (maker.scorer.timeout, maker.scorer.drop_failed) == (PPO["reward_timeout"], PPO["drop_failed"])
    assert (maker.whiten_rewards, maker.whiten_advantages) == (PPO["whiten_rewards"], PPO["whiten_advantages"])
    assert maker.advantage == GAE(gamma=gae["gamma"], lam=gae["lam"], critic_lam=gae["lam"])
    assert maker.reference_kl == ReferenceKL(in_reward=True, in_loss=False, estimator=SampledKL(k1))
    assert type(maker.kl_controller) is FixedKL
    assert maker.kl_controller.kl_coef == conf("kl_controller/fixed")["kl_coef"]
    assert type(maker.shaping.scaling) is NoScaling
    assert maker.shaping.score_clip is PPO["score_clip"] is None
    assert maker.shaping.missing_eos == SetMissingEos(conf("missing_eos/set")["missing_eos_score"])
    chosen: dict[str, str] = {}
    for entry in conf("train")["defaults"]:
        chosen |= entry if isinstance(entry, dict) else {}
    assert (chosen["advantage"], chosen["missing_eos"], chosen["score_scaling"]) == ("gae", "set", "none")
    assert (chosen["policy_loss"], chosen["old_kl"], chosen["aggregation"]) == ("clip", "k3", "token_mean")
    assert chosen["kl"] == "reward"


def test_of_prompts() -> None:
    assert defaults(PromptData) == {
        "batch_size": PPO["batch_size"],
        "samples_per_prompt": ROLLOUT["samples_per_prompt"],
        "iterations": PPO["num_iterations"],
        "eval_prompts": PPO["eval_prompts"],
        "eval_batch_size": PPO["batch_size"],
        "held_out_prompts": PPO["held_out"]["prompts"],
        "max_prompt_tokens": ROLLOUT["max_prompt_tokens"],
        "max_text_tokens": PPO["ptx_max_tokens"],
        "ptx_coef": PPO["ptx_coef"],
        "seed": conf("train")["seed"],
    }


def test_of_models() -> None:
    given = conf("model/base")
    lora = LoraSettings(**{name: value for name, value in given.pop("lora").items() if name != "_target_"})
    settings = {name: value for name, value in given.items() if name not in ("_target_", "name", "path")}
    assert ModelSettings(path="somewhere") == ModelSettings(name="model", path="somewhere", lora=lora, **settings)
