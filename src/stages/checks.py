"""Checks that run before weights are loaded: of a model they read only config.json."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from math import lcm
from pathlib import Path
from typing import Any, NoReturn

from transformers import PretrainedConfig

from src.checkpointing.checkpoint import HELD_OUT, ROLLOUT
from src.checkpointing.checksum import SUMS, damaged_models
from src.config.schema import Lora, Model, PPORun, RewardRun, Run, SFTRun, Sharded
from src.config.validate import refuse
from src.errors import ConfigError
from src.models.adapter_folders import adapter_base
from src.models.loading import context_length, load_config, load_decoder_config, run_part, unmatched_targets
from src.models.quantized_linear import require_bitsandbytes
from src.models.reward_choices import RewardChoice
from src.stages.objects import instantiate

ARTIFACTS = "artifacts"  # the folder of models that other runs need first (src.runs.prerequisites)


def refuse_damaged(given: str, path: str | None) -> None:
    """Raise `ConfigError` if the models in a run's folder, or one of them, are not those that the run has sealed."""
    folder = os.path.expanduser(path or "")
    if not path or not os.path.isdir(folder):  # False also for an invalid path
        return
    run = Path(folder) if (Path(folder) / SUMS).is_file() else Path(folder).parent
    found = damaged_models(run)
    if found:
        raise ConfigError(
            f"{given}: {', '.join(found[:3])} is not what the run wrote (by {run / SUMS}): restore it, train it again, "
            f"or remove {SUMS} if you changed it yourself"
        )


def check_quantized(run: Run, how: str | None) -> None:
    """A base in few bits needs its package, and layers that are whole on each process."""
    if how is None:
        return
    require_bitsandbytes()
    if isinstance(run.trainer.strategy, Sharded):
        refuse("model.quantize", how, "trainer=fsdp cannot shard weights of few bits: use trainer=ddp, or null")


def check_sft(run: SFTRun) -> None:
    """Raise `ConfigError` or `ModelError` in one sentence for a model that does not suit stage=sft."""
    architecture = architecture_of(run.model)
    _check_length(run, architecture, {"sft.max_tokens": run.sft.max_tokens})
    _check_lora(run.sft.lora, architecture, "model.lora", repr(run.model.name))


def check_reward(run: RewardRun, choice: RewardChoice) -> None:
    """The same for stage=reward and its reward model."""
    _check_reward_net(run, choice)
    _check_normalization(run, architecture_of(run.model))


def check_ppo(run: PPORun) -> None:
    """The same for stage=ppo and the folders of its rewards."""
    architecture, sizes = architecture_of(run.model), run.rollout
    lengths = {"rollout.max_prompt_tokens": sizes.max_prompt_tokens, "rollout.max_new_tokens": sizes.max_new_tokens}
    _check_length(run, architecture, lengths)
    _check_lora(run.model.lora, architecture, "model.lora", repr(run.model.name))
    if run.choices["engine"] == "vllm" and run.trainer.strategy is not None:
        raise ConfigError("engine=vllm serves one process; with several use engine=vllm_server (docs/engines.md)")
    if run.ppo.value_loss is None and run.model.lora is not None and run.model.lora.critic_layers is not None:
        refuse("model.lora.critic_layers", run.model.lora.critic_layers, "this advantage has no critic: use null")
    _check_pairs(run)
    _check_held_out(run)
    _check_correction(run)
    _check_judge_pairs(run)
    _check_lag(run)
    for path in _reward_paths(run.reward.model_dump(by_alias=True)):
        _check_reward_model(run_part(path, "model"))


def _check_judge_pairs(run: PPORun) -> None:
    """A judge of pairs needs several responses to a prompt, in one process, and compares no two policies."""
    if run.choices["reward"] != "judge_pairs":
        return
    if run.rollout.samples_per_prompt < 2:
        refuse("rollout.samples_per_prompt", 1, "reward=judge_pairs compares the responses to a prompt: at least 2")
    if run.trainer.strategy is not None:
        raise ConfigError("reward=judge_pairs compares responses within a process: use one process, or reward=judge")
    if run.choices["advantage"] == "remax" or run.ppo.held_out.best == "score":
        what = "advantage=remax" if run.choices["advantage"] == "remax" else "ppo.held_out.best=score"
        raise ConfigError(f"{what} scores one response to a prompt, which reward=judge_pairs cannot: use reward=judge")


def architecture_of(model: Model) -> PretrainedConfig:
    """The architecture of a path or of scratch. Raises `ConfigError` for a model with neither."""
    if model.path is not None:
        return load_decoder_config(model.path, trusted=model.trust_remote_code)
    if model.scratch is None:
        refuse("model.path", None, "must be a hub name or a folder, as this model is not made from scratch")
    return instantiate(model.scratch, "model.scratch").config()


def _check_length(run: Run, architecture: PretrainedConfig, lengths: dict[str, int]) -> None:
    """The longest text of the stage must fit into the model's context."""
    limit, needed = context_length(architecture), sum(lengths.values())
    if limit is not None and needed > limit:
        total = " + ".join(f"{key} ({value})" for key, value in lengths.items())
        *_, last = lengths
        left = limit - needed + lengths[last]
        _too_long(
            run, f"{total} may reach {needed} tokens, but model {run.model.name!r} reads at most {limit}",
            f"{last}={left}" if left >= 1 else f"a smaller {next(iter(lengths))}",
        )  # fmt: skip


def _too_long(run: Run, sentence: str, mend: str) -> NoReturn:
    """Raise `ConfigError` with the override that mends it; of a stage that another needs first, with its command."""
    if Path(run.run_dir or "").parent != Path(run.log_dir) / ARTIFACTS:
        raise ConfigError(f"{sentence}; give {mend}")
    command = f"python -m src.train {shlex.join([*run.overrides, mend])}"
    stage, given = ("SFT", "model.path") if run.stage == "sft" else ("reward", "reward.path")
    raise ConfigError(
        f"the {stage} stage that this run needs first: {sentence}; train it with `{command}`, then give {given}=FOLDER"
    )


def _check_lora(lora: Lora | None, architecture: PretrainedConfig, key: str, name: str) -> None:
    """Every layer named as a LoRA target must exist."""
    if lora is None:
        return
    layers = getattr(architecture.get_text_config(), "num_hidden_layers", None)
    for name_of, count in (("layers", lora.layers), ("critic_layers", lora.critic_layers)):
        if count is not None and layers is not None and count > layers:
            refuse(f"{key}.{name_of}", count, f"the model has {layers} layers")
    unmatched = unmatched_targets(architecture, lora.targets)
    if unmatched:
        raise ConfigError(
            f"{key}.targets=[{','.join(lora.targets)}]: no layer of model {name} is called "
            f"{' or '.join(unmatched)}; all-linear adapts every linear layer"
        )


def _check_reward_net(run: RewardRun, choice: RewardChoice) -> None:
    """Check the reward model's context, its LoRA targets, and the vocabulary head of a language-model loss."""
    settings = run.reward_model
    if settings.lm_coef > 0 and not choice.has_lm_head():
        refuse(
            "reward_model.lm_coef", settings.lm_coef,
            f"reward_net={run.choices['reward_net']} has no vocabulary head here; a language model with one has it "
            f"(reward_net=adapter, or pretrained)",
        )  # fmt: skip
    architecture = choice.architecture()
    if architecture is None:
        return
    longest = context_length(architecture)
    if longest is not None and settings.max_tokens > longest:
        sentence = f"reward_model.max_tokens={settings.max_tokens}: the reward model reads at most {longest} tokens"
        _too_long(run, sentence, f"reward_model.max_tokens={longest}")
    lora = getattr(settings.net, "lora", None)
    _check_lora(lora, architecture, "reward_model.net.lora", "of the reward stage")


def _check_normalization(run: RewardRun, architecture: PretrainedConfig) -> None:
    """The prompt and the samples that normalize the scores must fit into the SFT policy's context."""
    settings, limit = run.reward_model, context_length(architecture)
    if limit is None or settings.normalization_samples is None:
        return
    if settings.normalization_max_new_tokens >= limit:
        refuse(
            "reward_model.normalization_max_new_tokens", settings.normalization_max_new_tokens,
            f"must be smaller than {limit}, which is all that model {run.model.name!r} reads, prompt included",
        )  # fmt: skip


def _check_pairs(run: PPORun) -> None:
    """A reward model that is trained for the run needs a data set of preference pairs."""
    data, reward = run.data, run.reward
    columns = getattr(data, "columns", None)
    if columns is None or getattr(data, "pairs", None) is not None or getattr(reward, "path", "given") is not None:
        return
    if getattr(columns, "chosen", None) is None and not hasattr(columns, "choice"):
        raise ConfigError(
            f"reward={run.choices['reward']} without reward.path trains a reward model on preference pairs, and this "
            f"data set names none (data.columns.chosen, data.columns.rejected): choose another reward, such as "
            f"reward=function or reward=numeric, or give reward.path"
        )


def _check_held_out(run: PPORun) -> None:
    """What is measured while the policy trains must reach the log, and what decides must be measured."""
    held_out, log_every = run.ppo.held_out, run.ppo.log_every
    if held_out.every is None:
        for key in [key for key in ("best", "patience") if getattr(held_out, key) is not None]:
            refuse(f"ppo.held_out.{key}", getattr(held_out, key), "needs ppo.held_out.every: nothing is measured")
    elif held_out.every % log_every:
        why = f"must be a multiple of ppo.log_every ({log_every}), or a measurement is not logged"
        refuse("ppo.held_out.every", held_out.every, why)
    if held_out.best is not None and held_out.best.endswith("gold") and run.gold_reward is None:
        refuse("ppo.held_out.best", held_out.best, "needs a gold reward: choose one with gold_reward")
    if held_out.best is not None and run.ppo.early_stop is not None:
        refuse("ppo.held_out.best", held_out.best, "early_stop=gold decides too which policy is kept: early_stop=none")
    saved, measured = run.callbacks.checkpoint, held_out.every or run.ppo.num_iterations + 1
    if (saved.best_metric or "").startswith(HELD_OUT) and lcm(saved.every, measured) > run.ppo.num_iterations:
        why = "no iteration is both measured and saved: change ppo.held_out.every or callbacks.checkpoint.every"
        refuse("callbacks.checkpoint.best_metric", saved.best_metric, why)


def _check_correction(run: PPORun) -> None:
    """A loss with one ratio for a response needs one weight for it."""
    if run.choices["policy_loss"] == "gspo" and run.choices.get("correction_level") == "token":
        raise ConfigError(
            "correction_level=token: policy_loss=gspo has one ratio for a whole response; use correction_level=sequence"
        )


def _check_lag(run: PPORun) -> None:
    """Whoever keeps the policy that a rollout measures must still have it when the rollout is scored."""
    saved, lag = run.callbacks.checkpoint, run.rollout.lag
    if lag and run.ppo.early_stop is not None:
        refuse("rollout.lag", lag, "early_stop=gold keeps the policy that is updated, not the one before that sampled")
    if lag and saved.every == saved.keep == 1 and (saved.best_metric or "").startswith(ROLLOUT):
        why = f"must be at least 2 with rollout.lag=1: {saved.best_metric} is that of the checkpoint before the newest"
        refuse("callbacks.checkpoint.keep", saved.keep, why)


def _reward_paths(node: Any) -> Iterator[str]:
    """The folders of the reward models in a reward, at any depth of a mix."""
    if isinstance(node, Mapping):
        if str(node.get("_target_", "")).endswith(".LearnedReward") and node.get("path") is not None:
            yield str(node["path"])
        for value in node.values():
            yield from _reward_paths(value)


def _check_reward_model(path: str) -> None:
    """Refuse a folder whose config.json names another kind of model; an adapter's names only that of its base."""
    if adapter_base(path) is not None:
        return
    architecture = load_config(path, "reward.path")
    kinds = architecture.architectures or []
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"reward.path={path}: there is a {kinds[0]}, but a reward model is a sequence classifier with one output"
        )
    if architecture.num_labels != 1:
        raise ConfigError(f"reward.path={path}: the model has {architecture.num_labels} outputs where 1 is needed")
