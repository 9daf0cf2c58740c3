"""What a configuration says of a model; checked when it is made, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from src.errors import require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters W + (alpha / rank) B A on the target layers (https://arxiv.org/abs/2106.09685)."""

    rank: int
    alpha: float
    dropout: float
    targets: str | Sequence[str]
    layers: int | None = None  # adapters in the top so many layers only; None: in all

    def __post_init__(self) -> None:
        """Refuse ranges that cannot work."""
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "greater than 0")
        require(self.layers is None or self.layers >= 1, "layers", self.layers, "at least 1, or null")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")


@dataclass(frozen=True)
class ScratchSettings:
    """A model to be made from nothing in the SFT stage: its architecture and how its tokenizer is made from text."""

    config: Callable[..., PretrainedConfig]
    tokenizer: Callable[[list[str]], PreTrainedTokenizerBase]

    def config_for(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PretrainedConfig:
        """The architecture with the vocabulary and special tokens of `tokenizer`."""
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        return self.config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=pad, **options)


@dataclass(frozen=True)
class ModelSettings:
    """Where the weights lie and how they are held in memory."""

    name: str
    path: str | None  # hub name or folder; None: made in the SFT stage from `scratch`
    dtype: str
    attn_implementation: str
    gradient_checkpointing: bool
    lora: LoraSettings | None  # None: every weight is trained
    scratch: ScratchSettings | None
    prepack: bool = True  # on a CPU a second copy of the frozen weights, in the order that products read them in
    trust_remote_code: bool = False  # run the Python files that lie beside the weights

    def __post_init__(self) -> None:
        """Refuse an unknown dtype and a model that comes from nowhere."""
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(
            self.path is not None or self.scratch is not None,
            "path",
            self.path,
            "a hub name or a folder, as this model is not made from scratch",
        )

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`; a folder's own code is run only when that is asked for."""
        return {
            "dtype": DTYPES[self.dtype],
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
