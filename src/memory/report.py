"""The estimate of a configuration as a table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from src.config.schema import Node, PPORun
from src.memory.estimate import MemoryEstimate, Workload, estimate
from src.models.loading import load_config, run_part
from src.models.settings import ModelSettings
from src.rewards.learned import LearnedReward
from src.stages.checks import architecture_of
from src.stages.objects import instantiate
from src.types import Corpus

log = logging.getLogger(__name__)

LEARNED = f"{LearnedReward.__module__}.{LearnedReward.__qualname__}"
WORTH_SHOWING = 5 * 10**7  # weights
WIDTHS = {"weights": "weights", "gradients": "gradients", "optimizer": "Adam"}


def estimate_of(run: PPORun, ranks: int = 1) -> MemoryEstimate:
    """The memory of a PPO configuration; with several ranks for one rank's rows, every model whole."""
    model: ModelSettings = instantiate(run.model, "model")
    ppo, rollout = run.ppo, run.rollout
    rows, minibatch = -(-ppo.batch_size // ranks), -(-ppo.minibatch_size // ranks)
    load = Workload(
        rollout_rows=rows,
        scoring_rows=min(rollout.scoring_batch_size, rows),
        update_rows=min(ppo.micro_batch_size, minibatch),
        prompt_tokens=rollout.max_prompt_tokens,
        response_tokens=rollout.max_new_tokens,
    )
    critic = ppo.value_loss is not None
    return estimate(policy_architecture(run, model), model, reward_architectures(run), load, critic)


def policy_architecture(run: PPORun, model: ModelSettings) -> PretrainedConfig:
    """The policy's architecture; that of a model from scratch with the vocabulary of the tokenizer made for it."""
    if run.model.path is not None or model.scratch is None:
        return architecture_of(run.model)
    corpus: Corpus = instantiate(run.data, "data")
    return model.scratch.config_for(model.scratch.tokenizer(corpus.texts("train")))


def reward_architectures(run: PPORun) -> list[PretrainedConfig]:
    """The architectures of reward models with a path, of the gold reward too; embedded ones are too small to matter."""
    paths = [found for key in ("reward", "gold_reward") for found in _learned(getattr(run, key), key)]
    return [load_config(run_part(path, "model"), key) for key, path in paths]


def _learned(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and path of each reward model with a path in a node of the configuration, the parts of a mix included."""
    content = node.model_dump(by_alias=True) if isinstance(node, Node) else node
    if not isinstance(content, Mapping):
        return
    if content.get("_target_") == LEARNED and content.get("path") is not None:
        yield f"{key}.path", content["path"]
    for name, part in content.items():
        yield from _learned(part, f"{key}.{name}")


def memory_table(found: MemoryEstimate) -> Table:
    """Roles first, then phases."""
    table = Table(title=f"memory at most {readable(found.peak)}, estimated without loading weights")
    for column in ("", *WIDTHS.values(), "temporary"):
        table.add_column(column, justify="left" if not column else "right")
    for role, weights in found.weights.items():
        parts = [weights, found.gradients.get(role, 0), found.optimizer.get(role, 0)]
        table.add_row(role, *(readable(part) if part else "" for part in parts), "")
    table.add_section()
    for phase, size in found.phases.items():
        table.add_row(phase, "", "", "", readable(size))
    return table


def log_memory(run: PPORun) -> None:
    """Print the table when the model is large; a failure to estimate never stops a run."""
    if weights_of(architecture_of(run.model)) < WORTH_SHOWING:
        return
    try:
        Console().print(memory_table(estimate_of(run)))
    except Exception as error:
        log.info(f"how much memory this run takes cannot be estimated: {type(error).__name__}: {error}")


def weights_of(config: PretrainedConfig) -> int:
    """The number of weights of an architecture, counted without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def readable(size: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
