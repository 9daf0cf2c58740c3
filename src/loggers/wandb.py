"""Weights & Biases, offline without a login."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger


def wandb_logger(project: str, name: str | None, save_dir: str, offline: bool | None, **options: Any) -> WandbLogger:
    """Lightning's logger; with `offline=None` the run is offline unless there is a login (see `wandb sync`).

    A run folder has one wandb run, which is resumed with it, online or offline. `options`: those of `wandb.init`.
    """
    offline = not wandb.login(prompt=False) if offline is None else offline
    mode = "offline" if offline else "online"
    return WandbLogger(
        project=project, name=name, save_dir=save_dir, id=earlier_id(Path(save_dir)), mode=mode, **options
    )


def earlier_id(save_dir: Path) -> str | None:
    """The id of the wandb run that was started in `save_dir`, from its folder `wandb/[offline-]run-TIME-ID`."""
    folders = sorted((save_dir / "wandb").glob("*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))
    return folders[0].name.rsplit("-", 1)[-1] if folders else None
