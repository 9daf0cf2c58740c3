"""From a run's configuration to the sizes that the plan counts; of a model only config.json is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.config.schema import PPORun, Sharded
from src.errors import ConfigError
from src.memory.estimate import BASE, MemoryEstimate
from src.memory.report import policy_architecture, reward_architectures
from src.models.adapters import add_adapter
from src.models.settings import DTYPES, LoraSettings, ModelSettings
from src.plan.iteration import Ranks, Roles, Sizes
from src.plan.work import Maps, Shape
from src.stages.objects import instantiate

MIXED = "bfloat16"  # what trainer.precision=bf16-mixed computes in


def ranks_of(run: PPORun) -> Ranks:
    """The processes of the run."""
    return Ranks(run.trainer.devices * run.trainer.num_nodes, isinstance(run.trainer.strategy, Sharded))


def dtype_of(run: PPORun) -> str:
    """The dtype of the run's products."""
    return MIXED if run.trainer.precision == "bf16-mixed" else run.model.dtype


def sizes_of(run: PPORun, prompt: float | None = None, response: float | None = None) -> Sizes:
    """The sizes of an iteration; `prompt` and `response`: mean tokens, None for the longest that the run allows."""
    ppo, rollout = run.ppo, run.rollout
    return Sizes(
        rows=ppo.batch_size, samples=rollout.samples_per_prompt, prompt=prompt or rollout.max_prompt_tokens,
        response=response or rollout.max_new_tokens, epochs=ppo.epochs, scoring=rollout.scoring_batch_size,
        minibatch=min(ppo.minibatch_size, ppo.batch_size), micro=ppo.micro_batch_size,
        greedy=run.choices["advantage"] == "remax",
    )  # fmt: skip


def roles_of(run: PPORun, found: MemoryEstimate) -> Roles:
    """The roles of the run, with the bytes that the memory estimate counts."""
    settings: ModelSettings = instantiate(run.model, "model")
    lora, critic = settings.lora, "critic" in found.gradients
    policy = shape_of(policy_architecture(run, settings), dtype_of(run), lora)
    top = None if lora is None else lora.shared_above if critic else lora.layers
    coefficient = getattr(run.ppo, "kl_controller", None)
    return Roles(
        policy=policy, base=found.weights[BASE], gradients=found.gradients,
        rewards=[shape_of(reward, "float32", None) for reward in reward_architectures(run)],
        policy_layers=None if lora is None else lora.layers or policy.layers,
        critic_layers=None if lora is None else lora.shared_above or policy.layers,
        reference=run.choices["kl"] != "none" and getattr(coefficient, "kl_coef", 0) > 0,
        trunk=0 if top is None else policy.layers - top, policy_on_trunk=lora is not None and lora.layers is not None,
        entropy=run.ppo.entropy_coef > 0, checkpointing=settings.gradient_checkpointing,
        local=run.choices["engine"] == "local",
    )  # fmt: skip


def shape_of(config: PretrainedConfig, dtype: str, lora: LoraSettings | None) -> Shape:
    """The shape of an architecture, for a reward model too: the linear maps of its backbone, and where adapters go.

    Raises `ConfigError` for a mixture of experts, of which a token passes through some only.
    """
    scores = bool(config.architectures) and "SequenceClassification" in (config.architectures or [""])[0]
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    text = config.get_text_config()
    if any(name.startswith("num_") and "expert" in name for name in vars(text)):
        raise ConfigError(f"the time of a mixture of experts ({text.model_type}) is not predicted, only its memory")
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config)
        layers = text.num_hidden_layers
        maps = _maps([m for m in model.base_model.modules() if isinstance(m, nn.Linear | Conv1D)], layers)
        adapted: Maps = {}
        if lora is not None:
            add_adapter(model, replace(lora, layers=None, critic_layers=None), "policy")
            adapted = _maps([m for m in model.modules() if isinstance(m, BaseTunerLayer)], layers)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        layers=layers, width=text.hidden_size, maps=maps, adapted=adapted, attention=heads * size,
        cached=(getattr(text, "num_key_value_heads", None) or heads) * size, vocabulary=text.vocab_size,
        size=DTYPES[dtype].itemsize, rank=0 if lora is None else lora.rank,
    )  # fmt: skip


def _maps(modules: list[nn.Module], layers: int) -> Maps:
    """(inputs, outputs) -> how many a layer has, on average."""
    sizes = Counter(_size(module) for module in modules)
    return {size: count / layers for size, count in sizes.items()}


def _size(module: Any) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features
