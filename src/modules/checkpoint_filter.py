"""Checkpoints hold the trained tensors of a module only; they are checked when a checkpoint is read."""

from __future__ import annotations

from typing import Any

from torch import nn

from src.errors import ModelError


def trainable_names(module: nn.Module) -> set[str]:
    """The names of all parameters that require a gradient."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep_trainable(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Remove frozen tensors from a checkpoint; they are loaded from the paths of the configuration."""
    names = trainable_names(module)
    checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in names}


def require_trainable(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Raise `ModelError` when a checkpoint has missing or unexpected tensors, or tensors of other shapes."""
    trained, given = trainable_names(module), checkpoint["state_dict"]
    if set(given) != trained:
        raise ModelError(
            f"the checkpoint does not fit this model: missing {sorted(trained - set(given))[:3]}, "
            f"unexpected {sorted(set(given) - trained)[:3]}"
        )
    for name, parameter in module.named_parameters():
        if name in given and given[name].shape != parameter.shape:
            raise ModelError(
                f"the checkpoint does not fit this model: {name} is {tuple(given[name].shape)} in it and "
                f"{tuple(parameter.shape)} here: give the model that it was made with"
            )
