"""A decoder's pass over rows of different length without their padding.

All rows lie one after the other in a single one; linear layers and norms work on tokens and need not know. Attention
alone looks at other tokens: it is done row by row, by a function registered with transformers as an implementation of
attention, which the models hand what they are called with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from src.core.masking import position_ids
from src.core.padding import few_sizes

NAME = "row_by_row"
DECODERS = ("gpt2", "gpt_neox", "llama", "qwen2")  # that hand attention what they are called with: tested
SHORT = 512  # tokens of a row for which plain products are faster than PyTorch's attention, in bfloat16 on a CPU
SPARED = 2**19  # of padding per row, times the width squared: from here on a CPU gains more than the calls cost


def allow(model: PreTrainedModel) -> None:
    """Let a model that was loaded with PyTorch's attention take rows without padding, if its kind is known to."""
    if model.config._attn_implementation == "sdpa" and model.config.model_type in DECODERS:
        model.set_attn_implementation(NAME)


def pays(backbone: nn.Module, mask: Tensor) -> bool:
    """Whether a pass over the tokens of a mask (B, S) is better done without padding.

    Only on a CPU, where an operator costs little to call: by rows there are B times as many of them in attention.
    """
    config: Any = backbone.config
    if config._attn_implementation != NAME or mask.device.type != "cpu":
        return False
    padding = mask.numel() - int(mask.sum())
    return padding * config.hidden_size**2 > SPARED * len(mask)


def states(backbone: nn.Module, mask: Tensor, **inputs: Tensor) -> Tensor:
    """The last hidden states (B, S, H) of the tokens of a mask (B, S), 0 elsewhere; inputs (B, S) or (B, S, H).

    A last row of no meaning fills up the number of tokens to one of few.
    """
    lengths = [length for length in mask.sum(dim=1).tolist() if length]
    spare = few_sizes(sum(lengths)) - sum(lengths)

    def tokens(x: Tensor) -> Tensor:
        counted = x[mask]
        return torch.cat([counted, counted[:spare]]).unsqueeze(0) if spare else counted.unsqueeze(0)

    found = backbone(
        **{name: tokens(x) for name, x in inputs.items()},
        position_ids=tokens(position_ids(mask)),
        attention_mask=mask.new_empty(1, 1, 0, 0),  # one of four dimensions is handed through: none is made
        use_cache=False,
        row_lengths=[*lengths, spare] if spare else lengths,
    ).last_hidden_state
    whole: Tensor = found.new_zeros(*mask.shape, found.shape[-1])
    return whole.masked_scatter(mask.unsqueeze(-1), found)


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

    Without `row_lengths` the plain one: (B, heads, S, D) under a mask.
    """
    if row_lengths is None:
        return _attend(module, query, key, value, attention_mask, **options), None
    rows = zip(*(x.split(row_lengths, dim=2) for x in (query, key, value)), strict=True)
    window = options.get("sliding_window")
    return torch.cat([_attend(module, q, k, v, _band(q, window), **options) for q, k, v in rows], dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """What each token of a row sees of it where that is less than all before: the last `window`, itself included."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - window)[None, None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """Causal without a mask. (B, heads, S, D) -> (B, S, heads, D)."""
    half = query.dtype == torch.bfloat16 and query.device.type == "cpu" and type(query) is Tensor  # no stand-in
    if half and key.shape[2] <= SHORT and not options.get("dropout"):
        return _plain(query, key, value, mask, options["scaling"])
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The same in single products, which keep the weights for the way back; heads that share keys are done at once.

    Without a mask the last query sees all keys: a token that is drawn sees the whole cache.
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
