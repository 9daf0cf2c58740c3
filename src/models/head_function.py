"""What an architecture does with its logits after the vocabulary head: it may scale and cap them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from src.core.logprobs import normalized_logits

CHUNK = 2**24  # logits held at a time (64 MiB in float32); further tokens are computed in the next chunks
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")  # in config.json
DIVISORS = ("logits_scaling",)  # of Granite; HyperCLOVA X multiplies by the key of this name
CAPS = ("final_logit_softcapping",)


@dataclass(frozen=True)
class HeadFunction:
    """f(z) = cap tanh(scale z / cap), or scale z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The logits of the model, of any shape, from z = W h + b."""
        z = z if self.scale == 1 else z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


PLAIN = HeadFunction()


def candidates(config: PretrainedConfig) -> Iterator[HeadFunction]:
    """The functions that a configuration may mean, plain logits last."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in (*FACTORS, *CAPS)}
    scales = [found[name] for name in FACTORS if found[name]]
    scales += [1 / found[name] for name in DIVISORS if found[name]]
    yield from (HeadFunction(*pair) for pair in product([*scales, 1.0], [*filter(None, map(found.get, CAPS)), None]))


def function_of(head: nn.Module) -> HeadFunction:
    """The function after a vocabulary head, as `src.models.probe` has found it."""
    found: HeadFunction = getattr(head, "function", PLAIN)
    return found


def logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """f(W h + b). Shapes: (..., H) -> (..., V)."""
    z: Tensor = function_of(head)(head(hidden))
    return z


def capped_logprobs(head: nn.Module, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(a) and entropy of pi = softmax(f(W h + b) / temperature), in chunks that the backward pass recomputes.

    Shapes: hidden (N, H), ids (N,) int64 -> (N,), (N,) nats.
    """

    def read(part: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        log_p = normalized_logits(logits(head, part), temperature)
        return log_p.gather(1, chosen.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(dim=1)

    size = max(1, CHUNK // head.weight.shape[0])
    pieces = zip(hidden.split(size), ids.split(size), strict=True)
    found = [checkpoint(read, *piece, use_reentrant=False) for piece in pieces]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
