"""RMS norm of Llama and Qwen2 as one kernel on a GPU, where transformers starts eight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

Norm: Any = nn.Module if TYPE_CHECKING else object


class _OnGPU(Norm):
    """w x / sqrt(mean(x^2) + eps), rounded once at the end; a CPU takes as long either way and keeps its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        if x.device.type == "cpu":
            plain: Tensor = super().forward(x)
            return plain
        return rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


class FusedLlamaNorm(_OnGPU, LlamaRMSNorm):
    """Llama's."""


class FusedQwen2Norm(_OnGPU, Qwen2RMSNorm):
    """Qwen2's."""
