"""Gain and bias of a reward model's output."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from src.models.loading import ModelError


@torch.no_grad()
def normalise_scores(model: PreTrainedModel, mean: float, std: float) -> None:
    """Make the score (r - mean) / std instead of r, within the weights that plain transformers loads.

    The gain goes into the score head. The bias goes into the head's own where it has one, else into the bias of the
    last layer norm before it: for w' = w / std, adding d = -(mean / std) w' / |w'|^2 to that bias shifts the score by
    w' . d = -mean / std. Raises `ModelError` when scores do not vary, or when there is no bias to use.
    """
    if not std > 0:
        raise ModelError("the reward model gives every sample the same score: it has learned nothing")
    head = model.score
    norms = [module for module in model.base_model.children() if getattr(module, "bias", None) is not None]
    if head.bias is None and not norms:
        raise ModelError(f"{type(model).__name__} has neither a head bias nor a biased last layer norm to shift scores")
    head.weight /= std
    if head.bias is not None:
        head.bias.copy_((head.bias - mean) / std)
        return
    weight = head.weight[0]
    norms[-1].bias += -(mean / std) * weight / weight.square().sum()
