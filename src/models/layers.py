"""Large linear layers of a loaded model, made to use `src.core.linear`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.core.linear import linear

LARGE = 2**18  # weights from which a layer gains more by the faster product than the call costs


class Linear(nn.Linear):
    """`nn.Linear` with another product."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias)


class TransposedLinear(Conv1D):
    """GPT-2's `Conv1D`, whose weight lies transposed, with another product."""

    def forward(self, x: Tensor) -> Tensor:
        """x W + b, (..., K) -> (..., N)."""
        return linear(x, self.weight.t(), self.bias)


def with_fast_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; its large linear layers change their class, their names and weights stay."""
    kinds: dict[type, type] = {nn.Linear: Linear, Conv1D: TransposedLinear}
    for module in model.modules():
        if type(module) in kinds and module.weight.numel() >= LARGE:
            module.__class__ = kinds[type(module)]
    return model
