"""Settings of a model, checked when they are made, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from src.errors import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

QUANTIZED = ("nf4", "int8")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters W + (alpha / rank) B A on the target layers (https://arxiv.org/abs/2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    layers: int | None = None  # number of top layers with adapters; None: all
    critic_layers: int | None = None  # the same for the critic of PPO; None: as `layers`

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "greater than 0")
        require(self.layers is None or self.layers >= 1, "layers", self.layers, "at least 1, or null")
        alike = self.layers is None or self.critic_layers in (None, self.layers)
        require(alike, "critic_layers", self.critic_layers, f"null or {self.layers}, as layers={self.layers}")
        require(
            self.critic_layers is None or self.critic_layers >= 1, "critic_layers", self.critic_layers, "at least 1"
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")

    @property
    def of_critic(self) -> LoraSettings:
        """The settings of the critic's adapter."""
        return replace(self, layers=self.shared_above, critic_layers=None)

    @property
    def shared_above(self) -> int | None:
        """The number of top layers below which critic and reference are the same; None: nothing is shared."""
        return self.layers if self.critic_layers is None else self.critic_layers


@dataclass(frozen=True)
class ScratchSettings:
    """A model that the SFT stage makes from scratch: its architecture and how its tokenizer is made from text."""

    config: Callable[..., PretrainedConfig]
    tokenizer: Callable[[list[str]], PreTrainedTokenizerBase]

    def config_for(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PretrainedConfig:
        """The architecture with the vocabulary and special tokens of `tokenizer`."""
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        return self.config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=pad, **options)


@dataclass(frozen=True)
class ModelSettings:
    """Where the weights are and how they are held in memory. From Python, `ModelSettings(path=...)` is enough."""

    name: str = "model"  # its name in messages and folders
    path: str | None = None  # hub name or folder; None: made in the SFT stage from `scratch`
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = LoraSettings()  # None: every weight is trained
    scratch: ScratchSettings | None = None
    fast_cpu: bool = True  # use the fast CPU kernels of src/kernels
    prepack: bool = True  # and a second copy of the frozen weights, in the layout that products read
    quantize: str | None = None  # the frozen base in few bits: nf4 or int8
    trust_remote_code: bool = False  # run the Python files in the weights' folder

    def __post_init__(self) -> None:
        """Refuse unknown values, a model with neither path nor scratch, and weights of few bits that are trained."""
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(self.quantize in (None, *QUANTIZED), "quantize", self.quantize, f"{' or '.join(QUANTIZED)}, or null")
        frozen = self.quantize is None or self.lora is not None
        require(frozen, "lora", None, f"an adapter's settings with quantize={self.quantize}, whose weights are frozen")
        narrow = self.quantize is None or self.dtype != "float64"
        require(narrow, "dtype", self.dtype, f"bfloat16, float16 or float32 with quantize={self.quantize}")
        require(
            self.path is not None or self.scratch is not None,
            "path",
            self.path,
            "a hub name or a folder, as this model is not made from scratch",
        )

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`; a folder's code is run only with `trust_remote_code`."""
        return {
            "dtype": DTYPES[self.dtype],
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
