"""A decoder's forward pass over rows of different length without their padding.

All rows are concatenated to a single one; linear layers and norms work token by token and are unchanged. Only attention
reads other tokens: it is computed row by row, by a function registered with transformers as an implementation of
attention. The models pass their keyword arguments on to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from src.core.masking import position_ids
from src.kernels.attention import short_rows
from src.kernels.fast_adapters import adapt
from src.kernels.linear import bfloat16_is_native, few_sizes
from src.utils.double_backward import is_twice_differentiable

NAME = "row_by_row"
DECODERS = ("gpt2", "gpt_neox", "llama", "qwen2")  # that pass keyword arguments on to attention: tested
SHORT = {torch.bfloat16: 512, torch.float32: 256}  # longest rows for which plain matrix products are faster on a CPU
SPARED = 2**19  # padding per row times width squared, from which a CPU saves more than the calls cost


class FastPass:
    """The attribute `fast_pass` of a fast backbone."""

    @staticmethod
    def saves_time(backbone: nn.Module, mask: Tensor) -> bool:
        """Whether a forward pass over the tokens of a mask (B, S) is faster without padding."""
        return saves_time(backbone, mask)

    @staticmethod
    def states(backbone: nn.Module, mask: Tensor, cache: DynamicCache | None = None, **inputs: Tensor) -> Tensor:
        """The last hidden states of that pass."""
        return states(backbone, mask, cache, **inputs)

    @staticmethod
    def adapt(model: nn.Module) -> None:
        """Use the fused product for the adapters of the backbone."""
        adapt(model)


def enable(model: PreTrainedModel) -> None:
    """Enable padding-free passes of a model with PyTorch's attention, if its architecture supports them."""
    backbone: Any = model.base_model
    backbone.fast_pass = FastPass()
    if model.config._attn_implementation == "sdpa" and model.config.model_type in DECODERS:
        model.set_attn_implementation(NAME)


def saves_time(backbone: nn.Module, mask: Tensor) -> bool:
    """Whether a forward pass over the tokens of a mask (B, S) is faster without padding.

    Only on a CPU, where operator calls are cheap: row by row, attention has B times as many.
    """
    config: Any = backbone.config
    if config._attn_implementation != NAME or mask.device.type != "cpu":
        return False
    padding = mask.numel() - int(mask.sum())
    return padding * config.hidden_size**2 > SPARED * len(mask)


def states(backbone: nn.Module, mask: Tensor, cache: DynamicCache | None = None, **inputs: Tensor) -> Tensor:
    """The last hidden states (B, S, H) of the tokens of a mask (B, S), 0 elsewhere; inputs (B, S) or (B, S, H).

    An empty cache of plain layers is filled with their keys and values as (B, heads, S, D), 0 elsewhere too.
    Dummy tokens round their number up to one of a few sizes; at the end of the last row no token sees them.
    """
    lengths = [length for length in mask.sum(dim=1).tolist() if length]
    spare = few_sizes(sum(lengths)) - sum(lengths)
    lengths[-1] += spare

    def tokens(x: Tensor) -> Tensor:
        counted = x[mask]
        return torch.cat([counted, counted[:spare]]).unsqueeze(0) if spare else counted.unsqueeze(0)

    packed = None if cache is None else DynamicCache()
    found = backbone(
        **{name: tokens(x) for name, x in inputs.items()},
        position_ids=tokens(position_ids(mask)),
        attention_mask=mask.new_empty(1, 1, 0, 0),  # a mask of four dimensions is passed on unchanged: none is made
        past_key_values=packed,
        use_cache=packed is not None,
        row_lengths=lengths,
    ).last_hidden_state
    if cache is not None and packed is not None:
        for layer, own in zip(cache.layers, packed.layers, strict=True):
            layer.update(*(_in_rows(x.transpose(1, 2), mask).transpose(1, 2) for x in (own.keys, own.values)))
            own.keys = own.values = None  # free them, not to hold all of them twice
    return _in_rows(found, mask)


def _in_rows(x: Tensor, mask: Tensor) -> Tensor:
    """x (1, N, ...), the tokens of a mask (B, S) and the dummy tokens, as (B, S, ...), 0 elsewhere."""
    places = mask.flatten().nonzero().squeeze(1)
    whole = x.new_zeros(mask.numel(), *x.shape[2:]).index_copy(0, places, x[0, : len(places)])
    return whole.unflatten(0, mask.shape)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T / sqrt(D)) v within each row: (1, heads, N, D), N the tokens of all rows -> (1, N, heads, D).

    Without `row_lengths` plain attention: (B, heads, S, D) with a mask. In float32 where bfloat16 is not
    `bfloat16_is_native`.
    """
    if query.dtype == torch.bfloat16 and _on_cpu(query) and not bfloat16_is_native():
        with torch.autocast("cpu", enabled=False):
            wide = query.float(), key.float(), value.float()
            found, _ = attention(module, *wide, attention_mask, row_lengths, **options)
        return found.to(query.dtype), None
    if row_lengths is None:
        return _attend(module, query, key, value, attention_mask, **options), None
    window = options.get("sliding_window")
    if max(row_lengths) <= _short(query) and not options.get("dropout"):
        return short_rows(query, key, value, row_lengths, options["scaling"], window), None
    rows = zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([_attend(module, q, k, v, _band(q, window), **options) for q, k, v in rows], dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of a sliding window: each token sees the last `window` tokens, itself included; None if it sees all."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - window)[None, None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """Causal without a mask. (B, heads, S, D) -> (B, S, heads, D)."""
    if query.dtype == torch.bfloat16 and key.shape[2] <= _short(query) and not options.get("dropout"):
        return _plain(query, key, value, mask, options["scaling"])
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _short(query: Tensor) -> int:
    """The longest row that is computed in plain matrix products."""
    return SHORT.get(query.dtype, 0) if _on_cpu(query) and not is_twice_differentiable() else 0


def _on_cpu(query: Tensor) -> bool:
    return query.device.type == "cpu" and type(query) is Tensor  # not a fake tensor that stands for a GPU


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The same in plain matrix products; autograd keeps the weights, and heads that share keys are computed together.

    Without a mask the last query sees all keys: a sampled token sees the whole cache.
    """
    rows, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    if mask is None:
        seen = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(key.shape[2] - length)[None, None]
    scores = query.reshape(rows, -1, groups * length, query.shape[-1]) @ key.transpose(2, 3) * scaling
    scores = scores.unflatten(2, (groups, length)).masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    found = scores.softmax(dim=-1).flatten(2, 3) @ value
    return found.unflatten(2, (groups, length)).flatten(1, 2).transpose(1, 2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
