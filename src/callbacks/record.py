"""What a checkpoint says of the run that wrote it, and the refusal to go on from another run's."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.callbacks.sealed import CheckpointError
from src.models.fingerprint import fingerprint, tokenizer_fingerprint

FORMAT = 1
LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "peft", "numpy")
TOLD = "resume_changed=true goes on all the same"


class RunRecord(Callback):
    """Adds `format` and `run` to each checkpoint: configuration, versions, processes, revision, fingerprints.

    `config` is the resolved configuration in plain types, `git_revision` the commit or None. Going on with other
    frozen weights, another tokenizer, other training data or another number of processes raises `CheckpointError`,
    unless `allow_changes`; other versions of the libraries are warned of.
    """

    def __init__(self, config: dict[str, Any], git_revision: str | None, allow_changes: bool) -> None:
        self.config, self.git_revision, self.allow_changes = config, git_revision, allow_changes
        self.fingerprints: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the fingerprints of what is not trained, once, before a checkpoint is loaded."""
        if stage == "fit":
            parts = {name: fingerprint(part, frozen_only=True) for name, part in pl_module.named_children()}
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
        run = checkpoint["run"]
        for name, old in run["fingerprints"].items():
            if self.fingerprints.get(name) != old:
                what = "another tokenizer" if name == "tokenizer" else f"other frozen weights (of its {name})"
                self._refuse(f"the checkpoint was made with {what} than this run has")
        if run["world_size"] != trainer.world_size:
            self._refuse(f"the checkpoint was made by {run['world_size']} processes, this run has {trainer.world_size}")
        other = [f"{name} {old} (now {version(name)})" for name, old in run["versions"].items() if old != version(name)]
        if other:
            warnings.warn(f"the checkpoint was made with {', '.join(other)}: equal bits are not promised", stacklevel=2)
        if self.config["schedule_steps"] > run["config"]["schedule_steps"]:
            lengthen(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders have found out whether their rows are those of the checkpoint; if not they begin anew."""
        loaders = trainer.train_dataloader
        for loader in loaders.values() if isinstance(loaders, dict) else [loaders]:
            if getattr(loader, "changed", False):
                self._refuse(f"the training data ({loader.stream}) are not those of the checkpoint")
                print(f"the training data ({loader.stream}) have changed: they are read from their beginning")

    def _refuse(self, what: str) -> None:
        if not self.allow_changes:
            raise CheckpointError(f"{what}: give the same again, or {TOLD}; resume=never starts anew")


def lengthen(checkpoint: dict[str, Any]) -> None:
    """A stage that has become longer: what was its last iteration is so no more."""
    loop = checkpoint["loops"]["fit_loop"]
    if loop["epoch_loop.batch_progress"]["is_last_batch"]:
        loop["epoch_loop.batch_progress"]["is_last_batch"] = False
        progress = loop["epoch_loop.batch_progress"]["total"]
        if progress["completed"] == progress["processed"]:  # saved after the validation; Lightning counts on one more
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
