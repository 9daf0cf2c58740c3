"""Metadata of the run in a checkpoint, and the refusal to resume from another run's."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.errors import CheckpointError, ConfigError
from src.models.fingerprint import fingerprint, tokenizer_fingerprint
from src.rewards.learned import LearnedReward

log = logging.getLogger(__name__)

FORMAT = 2
LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "peft", "numpy")
READING = ".reading"  # suffix of fingerprints of a learned reward's settings other than its weights
TO_ALLOW = "allow_config_change=true to resume with the change"


class RunMetadata(Callback):
    """Adds `format` and `run` to each checkpoint: configuration, versions, processes, revision, fingerprints.

    `config` is the resolved configuration in plain types, `code` the fingerprints of the code that it names (both are
    compared by `find_checkpoint`), `git_revision` the commit or None. Resuming with other
    frozen weights, another tokenizer, other settings of a learned reward or other training data raises
    `CheckpointError`, unless `allow_changes`; so does another number of processes if the model has dropout, which each
    process draws for its own rows. Other versions of the libraries give a warning. The optimizers' settings are those
    of the configuration, not those of the checkpoint.
    """

    def __init__(
        self, config: dict[str, Any], code: dict[str, str], git_revision: str | None, allow_changes: bool
    ) -> None:
        self.config, self.code, self.git_revision, self.allow_changes = config, code, git_revision, allow_changes
        self.fingerprints: dict[str, str] = {}
        self.optimizers: list[list[dict[str, Any]]] = []
        self.loaded: int | None = None  # number of optimizers in the loaded checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compute the fingerprints of the frozen parts once, before a checkpoint is loaded."""
        if stage == "fit":
            parts = {name: fingerprint(part, frozen_only=True) for name, part in pl_module.named_children()}
            learned = {n: part for n, part in pl_module.named_modules() if isinstance(part, LearnedReward)}
            parts |= {f"{name}{READING}": part.reading() for name, part in learned.items()}
            self.fingerprints = parts | {"tokenizer": tokenizer_fingerprint(trainer.datamodule.tokenizer)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the metadata."""
        checkpoint["format"] = FORMAT
        checkpoint["run"] = {
            "config": self.config,
            "code": self.code,
            "git_revision": self.git_revision,
            "versions": {name: version(name) for name in LIBRARIES},
            "world_size": trainer.world_size,
            "fingerprints": self.fingerprints,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the metadata with this run."""
        self.loaded, run = len(checkpoint["optimizer_states"]), checkpoint["run"]
        for name, old in run["fingerprints"].items():
            if self.fingerprints.get(name) != old:
                self._refuse(f"the checkpoint was made with {difference_of(name)} than this run has")
        if run["world_size"] != trainer.world_size and has_dropout(pl_module):
            self._refuse(
                f"the checkpoint was made by {run['world_size']} processes, this run has {trainer.world_size}, and its "
                f"model has dropout, which each process draws for its own rows"
            )
        other = [f"{name} {old} (now {version(name)})" for name, old in run["versions"].items() if old != version(name)]
        if other:
            warnings.warn(
                f"the checkpoint was made with {', '.join(other)}: equal bits are not guaranteed", stacklevel=2
            )
        if length(self.config) > length(run["config"]):
            lengthen(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the configured settings of the optimizers, before Lightning loads their states."""
        self.optimizers = [settings_of(optimizer) for optimizer in trainer.optimizers]
        if self.loaded not in (None, len(self.optimizers)):
            raise CheckpointError(
                f"the checkpoint holds the states of {self.loaded} optimizers, this run has {len(self.optimizers)} "
                f"(policy_loss=trpo has none for the policy): give the same policy_loss, or resume=never to start again"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the optimizers' settings; refuse other training data, which the loaders have detected."""
        if self.loaded is not None:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer, settings in zip(trainer.optimizers, self.optimizers, strict=True):
                reconfigure(
                    optimizer, settings, [schedule for schedule in schedules if schedule.optimizer is optimizer]
                )
        loaders = trainer.train_dataloader
        for loader in loaders.values() if isinstance(loaders, dict) else [loaders]:
            if getattr(loader, "changed", False):
                self._refuse(f"the training data ({loader.stream}) are not those of the checkpoint")
                rank_zero_only(log.info)(
                    f"the training data ({loader.stream}) have changed: they are read from their beginning"
                )

    def _refuse(self, what: str) -> None:
        if not self.allow_changes:
            raise CheckpointError(f"{what}: give the same, or {TO_ALLOW}, or resume=never to start again")


LENGTH = {"sft": ("sft", "steps"), "reward": ("reward_model", "steps"), "ppo": ("ppo", "num_iterations")}


def length(config: dict[str, Any]) -> int:
    """The number of iterations or steps of the stage that a configuration describes."""
    node, key = LENGTH[config["stage"]]
    return int(config[node][key])


def refuse_shorter(checkpoint: dict[str, Any], config: dict[str, Any], path: str) -> None:
    """Refuse a stage that was planned longer and is now no longer than what the checkpoint has finished of it.

    Lightning would train the whole length again, from the weights that are finished.
    """
    old, new = length(checkpoint["run"]["config"]), length(config)
    if new >= old:
        return
    finished = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    if new <= finished:
        key = ".".join(LENGTH[config["stage"]])
        raise ConfigError(
            f"{key}={new}: {path} was planned for {old} and has finished {finished} already: give more than that, "
            f"resume=PATH of an earlier checkpoint and another name, or resume=never to start again"
        )


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, eps, betas, weight decay of each group of parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def reconfigure(optimizer: Optimizer, settings: list[dict[str, Any]], schedules: list[Any]) -> None:
    """Set `settings` in a loaded optimizer; its moments and the step counts of its schedules are unchanged.

    The learning rate becomes base rate * lambda(count), with the lambda of the configured schedule.
    """
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update({key: value for key, value in configured.items() if key != "lr"})
    for schedule in schedules:
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        if isinstance(schedule, LambdaLR):  # others compute the rate from the base rates or the previous rate
            for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def has_dropout(module: LightningModule) -> bool:
    """Whether dropout is drawn while `module` trains: in a module of its own, or by attention as config.json says."""
    parts = list(getattr(module, "net", nn.Module()).modules())  # the roles of PPO are always in eval mode
    by_attention = (getattr(part.config, "attention_dropout", 0.0) for part in parts if hasattr(part, "config"))
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts) or any(by_attention)


def difference_of(name: str) -> str:
    """What has changed when the fingerprint `name` differs."""
    if name.endswith(READING):
        return f"another tokenizer, length, chat template or score_bias (of its {name.removesuffix(READING)})"
    return "another tokenizer" if name == "tokenizer" else f"other frozen weights (of its {name})"


def lengthen(checkpoint: dict[str, Any]) -> None:
    """Mark the last iteration of a checkpoint as not the last, for a stage that is now longer."""
    loop = checkpoint["loops"]["fit_loop"]
    if loop["epoch_loop.batch_progress"]["is_last_batch"]:
        loop["epoch_loop.batch_progress"]["is_last_batch"] = False
        progress = loop["epoch_loop.batch_progress"]["total"]
        if progress["completed"] == progress["processed"]:  # saved after the validation; Lightning expects one more
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
