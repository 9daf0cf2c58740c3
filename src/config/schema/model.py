"""The language model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from src.config.schema.nodes import LARGEST, Count, Location, Positive, Share, Typed


class Lora(Typed):
    """Low-rank adapters."""

    rank: Count
    alpha: Positive
    dropout: Share
    targets: str | list[str]
    layers: Count | None = None
    critic_layers: Count | None = None


class GPT2(Typed):
    """The architecture of a small model made from scratch."""

    n_layer: Count
    n_head: Count
    n_embd: Count
    n_positions: Count
    activation_function: str
    resid_pdrop: Share
    embd_pdrop: Share
    attn_pdrop: Share


class Tokenizer(Typed):
    """A tokenizer that is made from the corpus."""

    vocab_size: Annotated[int, Field(ge=258, le=LARGEST)] | None = None


class Scratch(Typed):
    """A model that the SFT stage makes from nothing."""

    config: GPT2
    tokenizer: Tokenizer


class Model(Typed):
    """The language model."""

    name: str
    path: Location | None
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
    gradient_checkpointing: bool
    fast_cpu: bool
    prepack: bool
    quantize: Literal["nf4", "int8"] | None
    trust_remote_code: bool
    lora: Lora | None
    scratch: Scratch | None
