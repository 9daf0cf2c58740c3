"""What a checkpoint says of the run that wrote it, and the refusal to go on from another run's."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.errors import CheckpointError
from src.models.fingerprint import fingerprint, tokenizer_fingerprint
from src.rewards.learned import LearnedReward

FORMAT = 1
LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "peft", "numpy")
READING = ".reading"  # ends the names of the fingerprints of what decides a learned reward's scores beside its weights
TOLD = "allow_config_change=true goes on all the same"


class RunMetadata(Callback):
    """Adds `format` and `run` to each checkpoint: configuration, versions, processes, revision, fingerprints.

    `config` is the resolved configuration in plain types, `git_revision` the commit or None. Going on with other
    frozen weights, another tokenizer, a learned reward that reads or adds up in another way, other training data or
    another number of processes raises `CheckpointError`, unless `allow_changes`; other versions of the libraries are
    warned of. What the configuration says of the optimizers holds, whatever the checkpoint says of them; for a run with
    the settings of its checkpoint that is the same.
    """

    def __init__(self, config: dict[str, Any], git_revision: str | None, allow_changes: bool) -> None:
        self.config, self.git_revision, self.allow_changes = config, git_revision, allow_changes
        self.fingerprints: dict[str, str] = {}
        self.optimizers: list[list[dict[str, Any]]] = []
        self.loaded: int | None = None  # optimizers in the checkpoint that was read

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the fingerprints of what is not trained, once, before a checkpoint is loaded."""
        if stage == "fit":
            parts = {name: fingerprint(part, frozen_only=True) for name, part in pl_module.named_children()}
            learned = {n: part for n, part in pl_module.named_modules() if isinstance(part, LearnedReward)}
            parts |= {f"{name}{READING}": part.reading() for name, part in learned.items()}
            self.fingerprints = parts | {"tokenizer": tokenizer_fingerprint(trainer.datamodule.tokenizer)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record."""
        checkpoint["format"] = FORMAT
        checkpoint["run"] = {
            "config": self.config,
            "git_revision": self.git_revision,
            "versions": {name: version(name) for name in LIBRARIES},
            "world_size": trainer.world_size,
            "fingerprints": self.fingerprints,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the record with this run."""
        self.loaded, run = len(checkpoint["optimizer_states"]), checkpoint["run"]
        for name, old in run["fingerprints"].items():
            if self.fingerprints.get(name) != old:
                self._refuse(f"the checkpoint was made with {said_of(name)} than this run has")
        if run["world_size"] != trainer.world_size:
            self._refuse(f"the checkpoint was made by {run['world_size']} processes, this run has {trainer.world_size}")
        other = [f"{name} {old} (now {version(name)})" for name, old in run["versions"].items() if old != version(name)]
        if other:
            warnings.warn(f"the checkpoint was made with {', '.join(other)}: equal bits are not promised", stacklevel=2)
        if self.config["schedule_steps"] > run["config"]["schedule_steps"]:
            lengthen(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizers are as they were configured; Lightning loads their states after this, one by one."""
        self.optimizers = [settings_of(optimizer) for optimizer in trainer.optimizers]
        if self.loaded not in (None, len(self.optimizers)):
            raise CheckpointError(
                f"the checkpoint holds the states of {self.loaded} optimizers, this run has {len(self.optimizers)} "
                f"(policy_loss=trpo has none for the policy): give the same again; resume=never starts anew"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders have found out whether their rows are those of the checkpoint; if not they begin anew."""
        if self.loaded is not None:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer, settings in zip(trainer.optimizers, self.optimizers, strict=True):
                put_back(optimizer, settings, [schedule for schedule in schedules if schedule.optimizer is optimizer])
        loaders = trainer.train_dataloader
        for loader in loaders.values() if isinstance(loaders, dict) else [loaders]:
            if getattr(loader, "changed", False):
                self._refuse(f"the training data ({loader.stream}) are not those of the checkpoint")
                print(f"the training data ({loader.stream}) have changed: they are read from their beginning")

    def _refuse(self, what: str) -> None:
        if not self.allow_changes:
            raise CheckpointError(f"{what}: give the same again, or {TOLD}; resume=never starts anew")


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Rates, eps, betas, weight decay of each group of parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def put_back(optimizer: Optimizer, settings: list[dict[str, Any]], schedules: list[Any]) -> None:
    """Let `settings` hold in an optimizer that was loaded; its moments and the counts of its schedules stay.

    The rate becomes base rate * lambda(count), with the lambda of the schedule as it is configured now.
    """
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update({key: value for key, value in configured.items() if key != "lr"})
    for schedule in schedules:
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        if isinstance(schedule, LambdaLR):  # others find the rate from the base rates or from the rate before
            for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def said_of(name: str) -> str:
    """What differs where the fingerprint of that name does."""
    if name.endswith(READING):
        return f"another tokenizer, length, chat template or score_bias (of its {name.removesuffix(READING)})"
    return "another tokenizer" if name == "tokenizer" else f"other frozen weights (of its {name})"


def lengthen(checkpoint: dict[str, Any]) -> None:
    """A stage that has become longer: what was its last iteration is so no more."""
    loop = checkpoint["loops"]["fit_loop"]
    if loop["epoch_loop.batch_progress"]["is_last_batch"]:
        loop["epoch_loop.batch_progress"]["is_last_batch"] = False
        progress = loop["epoch_loop.batch_progress"]["total"]
        if progress["completed"] == progress["processed"]:  # saved after the validation; Lightning counts on one more
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
