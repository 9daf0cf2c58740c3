"""What of a module goes into a checkpoint: the tensors that are trained, and they must fit when it is read."""

from __future__ import annotations

from typing import Any

from torch import nn

from src.errors import ModelError


def trainable_names(module: nn.Module) -> set[str]:
    """The names of all parameters that ask for a gradient."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def keep_trainable(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Leave frozen tensors out; the configuration says where they come from."""
    names = trainable_names(module)
    checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in names}


def require_trainable(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Raise `ModelError` when a checkpoint lacks or exceeds what is trained."""
    names, found = trainable_names(module), set(checkpoint["state_dict"])
    if found != names:
        raise ModelError(
            f"the checkpoint does not fit this model: missing {sorted(names - found)[:3]}, "
            f"unexpected {sorted(found - names)[:3]}"
        )
