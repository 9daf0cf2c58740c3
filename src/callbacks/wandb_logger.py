"""Weights & Biases, offline when nobody has logged in."""

from __future__ import annotations

import wandb
from lightning.pytorch.loggers import WandbLogger


def wandb_logger(project: str, name: str | None, save_dir: str, offline: bool | None) -> WandbLogger:
    """Lightning's logger; with `offline=None` the run stays on disk unless there is a login (see `wandb sync`)."""
    offline = not wandb.login(prompt=False) if offline is None else offline
    return WandbLogger(project=project, name=name, save_dir=save_dir, mode="offline" if offline else "online")
