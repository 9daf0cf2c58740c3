"""Parts of a loaded model, made to compute the same by faster routes: large linear layers, attention, an activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from src.kernels import padding_free
from src.kernels.double_backward import is_twice_differentiable
from src.kernels.gelu import gelu_tanh
from src.kernels.linear import linear, prepacked
from src.utils.allocator import trim

LARGE = 2**18  # weights from which a layer gains more by the faster product than the call costs
WORTH_A_COPY = {torch.float32: 2**21, torch.bfloat16: 2**20}  # weights from which prepacking gains more than a little


class Packed:
    """A frozen weight as oneDNN reads it, made at its first use and again when the weight is another.

    A copy of the layer has none: the weights of copies are merged with adapters, in ways that leave no trace.
    """

    def __init__(self) -> None:
        self._of: tuple[object, ...] | None = None
        self._packed: Tensor | None = None

    def get(self, weight: Tensor) -> Tensor | None:
        """Of `weight` (N, K); None while it is trained, and where nothing is gained."""
        now = (weight.data_ptr(), weight._version, weight.dtype, weight.device, torch.is_autocast_enabled("cpu"))
        if now != self._of:
            self._of, self._packed = now, None if weight.requires_grad else prepacked(weight)
            trim()  # packing takes a second copy for a moment
        return self._packed

    def __deepcopy__(self, _: object) -> None:
        return None


class Linear(nn.Linear):
    """`nn.Linear` with another product."""

    packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias, self.packed and self.packed.get(self.weight))


class TransposedLinear(Conv1D):
    """GPT-2's `Conv1D`, whose weight lies transposed, with another product."""

    packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x W + b, (..., K) -> (..., N)."""
        return linear(x, self.weight.t(), self.bias, self.packed and self.packed.get(self.weight.t()))


class FusedGELU(nn.Module):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which transformers does in eight passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return gelu(x, approximate="tanh") if is_twice_differentiable() else gelu_tanh(x)


def with_fast_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; such modules change their class, their names and weights stay."""
    padding_free.enable(model)
    instead: dict[type, type] = {nn.Linear: Linear, Conv1D: TransposedLinear, NewGELUActivation: FusedGELU}
    for module in model.modules():
        small = isinstance(module, nn.Linear | Conv1D) and module.weight.numel() < LARGE
        if type(module) in instead and not small:
            module.__class__ = instead[type(module)]
    return model


def prepack(model: nn.Module) -> None:
    """Keep the frozen weights of large layers a second time on a CPU, as the faster product reads them."""
    for layer in layers_to_pack(model):
        layer.packed = Packed()


def layers_to_pack(model: nn.Module) -> list[Linear | TransposedLinear]:
    """The layers that `prepack` is meant for."""
    fast = [module for module in model.modules() if isinstance(module, Linear | TransposedLinear)]
    return [layer for layer in fast if layer.weight.numel() >= WORTH_A_COPY.get(layer.weight.dtype, 2**63)]
