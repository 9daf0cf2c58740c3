"""A linear layer whose frozen weight is held in 4 or 8 bits; its products are made in the dtype of the model.

Only the storage is bitsandbytes'. Its own 8-bit layer rounds the activations too, by thresholds of the whole batch: a
token's log-probability would depend on the other rows, and no exported model could give it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from src.errors import ModelError

BLOCK = 64  # weights that share a scale in NF4, as bitsandbytes and transformers have it


def require_bitsandbytes() -> None:
    """Raise `ModelError` without the package."""
    if find_spec("bitsandbytes") is None:
        raise ModelError("model.quantize needs the package bitsandbytes: pip install -e '.[quantize]'")


class QuantizedLinear(nn.Linear):
    """x W^T + b with a W of few bits, which is dequantized for each product, in the forward and in the backward pass.

    `how`: "nf4" (16 values of a normal distribution, a scale for each 64 weights: 4.5 bits a weight;
    https://arxiv.org/abs/2305.14314) or "int8" (127 steps on either side of 0, a scale for each output: 8 bits).
    """

    def __init__(self, layer: nn.Linear | Conv1D, how: str) -> None:
        transposed = isinstance(layer, Conv1D)  # GPT-2 keeps W^T
        weight = layer.weight.detach().t() if transposed else layer.weight.detach()
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.how, self.dtype, self.transposed, self.bias = how, weight.dtype, transposed, layer.bias
        self.product = getattr(layer, "product", F.linear)  # that of a fast layer
        packed, scales = _packed(weight.float().contiguous(), how)
        # both are parameters, so that fingerprints, memory estimate and moves to a device know them
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        found: Tensor = _Product.apply(x, self)
        return found

    def dequantized(self) -> Tensor:
        """W (N, K), rounded to the dtype of the model that was quantized."""
        import bitsandbytes.functional as bits

        if self.how == "int8":
            return bits.int8_vectorwise_dequant(self.weight, self.scales).to(self.dtype)
        # blocks run on from row to row; by rows of another length than a block bitsandbytes' CPU kernel mixes up scales
        count = self.out_features * self.in_features
        shape = torch.Size((count // BLOCK, BLOCK) if count % BLOCK == 0 else (1, count))
        state = bits.QuantState(self.scales, shape, blocksize=BLOCK, quant_type=self.how, dtype=self.dtype)
        return bits.dequantize_4bit(self.weight, state).view(self.out_features, self.in_features)

    def plain(self, dtype: torch.dtype, update: Tensor | None = None) -> nn.Linear | Conv1D:
        """The layer with W + `update` (N, K), which is added in float32 or better and rounded once, to `dtype`."""
        weight = self.dequantized()
        if update is not None:
            weight = weight.to(torch.promote_types(update.dtype, torch.float32)) + update
        weight = (weight.t() if self.transposed else weight).to(dtype).contiguous()
        with torch.device("meta"):
            sizes = self.in_features, self.out_features
            layer = Conv1D(*sizes[::-1]) if self.transposed else nn.Linear(*sizes, bias=self.bias is not None)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


class _Product(torch.autograd.Function):
    """Autograd of a plain product would keep each dequantized W from the forward to the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        found: Tensor = layer.product(x, layer.dequantized().to(x.dtype), layer.bias)
        return found

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product(above, ctx.layer.dequantized().to(above.dtype).t()), None


def _packed(weight: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """A float32 weight (N, K) in few bits, and its scales."""
    import bitsandbytes.functional as bits

    if how == "int8":
        return bits.int8_vectorwise_quant(weight)[:2]
    packed, state = bits.quantize_4bit(weight, blocksize=BLOCK, quant_type=how)
    return packed, state.absmax
