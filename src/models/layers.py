"""Parts of a loaded model, made to compute the same by faster routes: large linear layers, attention, an activation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from src.core.linear import linear
from src.models import padding_free

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


class FusedGELU(nn.Module):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in one pass over memory instead of eight."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return gelu(x, approximate="tanh")


def with_fast_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; such modules change their class, their names and weights stay."""
    padding_free.allow(model)
    instead: dict[type, type] = {nn.Linear: Linear, Conv1D: TransposedLinear, NewGELUActivation: FusedGELU}
    for module in model.modules():
        small = isinstance(module, nn.Linear | Conv1D) and module.weight.numel() < LARGE
        if type(module) in instead and not small:
            module.__class__ = instead[type(module)]
    return model
