"""RMS norm of Llama and Qwen2 as one kernel on a GPU, where transformers starts eight."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm


class FusedLlamaNorm(LlamaRMSNorm):
    """Llama's; a CPU takes as long either way and keeps the plain one."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        normed: Tensor = super().forward(x) if x.device.type == "cpu" else fused(self, x)
        return normed


class FusedQwen2Norm(Qwen2RMSNorm):
    """Qwen2's, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        normed: Tensor = super().forward(x) if x.device.type == "cpu" else fused(self, x)
        return normed


def fused(norm: LlamaRMSNorm | Qwen2RMSNorm, x: Tensor) -> Tensor:
    """w x / sqrt(mean(x^2) + eps), rounded once at the end. Shapes: (..., H) -> (..., H)."""
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
