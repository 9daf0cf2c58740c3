"""Fast layers of a loaded model with the same results: large linear layers, attention, GPT-2's activation, norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.pytorch_utils import Conv1D

from src.kernels import padding_free
from src.kernels.linear import bfloat16_is_native, by_onednn, few_sizes, linear, prepacked
from src.kernels.norm import FusedLlamaNorm, FusedQwen2Norm
from src.utils.allocator import trim

LARGE = 2**18  # smallest number of weights for which the faster product saves more than its call costs
WORTH_A_COPY = {torch.float32: 2**21, torch.bfloat16: 2**20}  # smallest layers that are worth packing


class Packed:
    """A frozen weight in oneDNN's layout, made at its first use and again when the weight is replaced.

    A copy of the layer has none, as adapters are merged into the weights of copies, which cannot be detected.
    """

    def __init__(self) -> None:
        self._of: tuple[object, ...] | None = None
        self._packed: Tensor | None = None

    def get(self, weight: Tensor) -> Tensor | None:
        """The packed `weight` (N, K); None while it is trained or if packing does not help."""
        now = (weight.data_ptr(), weight._version, weight.dtype, weight.device, torch.is_autocast_enabled("cpu"))
        if now != self._of:
            self._of, self._packed = now, None if weight.requires_grad else prepacked(weight)
            trim()  # packing needs a second copy for a moment
        return self._packed

    def __deepcopy__(self, _: object) -> None:
        return None


class Linear(nn.Linear):
    """`nn.Linear` with the faster product."""

    packed: Packed | None = None
    product = staticmethod(linear)  # product of a vocabulary head in blocks of words
    rows = staticmethod(few_sizes)  # numbers of rows that its products suit best

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias, self.packed and self.packed.get(self.weight))


class TransposedLinear(Conv1D):
    """GPT-2's `Conv1D`, whose weight is transposed, with the faster product."""

    packed: Packed | None = None
    product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        """x W + b, (..., K) -> (..., N)."""
        return linear(x, self.weight.t(), self.bias, self.packed and self.packed.get(self.weight.t()))


class FusedGELU(nn.Module):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which transformers computes in eight passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        return gelu(x, approximate="tanh")


def with_fast_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with the classes of such modules changed; their names and weights are unchanged."""
    padding_free.enable(model)
    instead: dict[type, type] = {
        **{nn.Linear: Linear, Conv1D: TransposedLinear, NewGELUActivation: FusedGELU},
        **{LlamaRMSNorm: FusedLlamaNorm, Qwen2RMSNorm: FusedQwen2Norm},
    }
    for module in model.modules():
        small = isinstance(module, nn.Linear | Conv1D) and module.weight.numel() < _large(module.weight.dtype)
        if type(module) in instead and not small:
            module.__class__ = instead[type(module)]
    return model


def _large(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bfloat16 and not bfloat16_is_native() else LARGE


def prepack(model: nn.Module) -> None:
    """Keep a second copy of the frozen weights of large layers on a CPU, in the layout of the faster product."""
    for layer in layers_to_pack(model):
        layer.packed = Packed()


def layers_to_pack(model: nn.Module) -> list[Linear | TransposedLinear]:
    """The layers that `prepack` packs."""
    fast = [module for module in model.modules() if isinstance(module, Linear | TransposedLinear)]
    worth = {dtype: size for dtype, size in WORTH_A_COPY.items() if by_onednn(dtype)}
    return [layer for layer in fast if layer.weight.numel() >= worth.get(layer.weight.dtype, 2**63)]
