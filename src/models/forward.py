"""Forward passes over prompt + response: hidden states at the response tokens, and one score per sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from src.core.masking import last_counted, position_ids
from src.models.sharding import plain_head
from src.models.vocab_head import token_logprobs
from src.types import Rollout


def hidden_states(lm: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states of the backbone. Shapes: ids, mask (B, S) -> (B, S, H)."""
    return backbone_states(lm.base_model, mask, input_ids=ids)


def backbone_states(backbone: nn.Module, mask: Tensor, **inputs: Tensor) -> Tensor:
    """Last hidden states (B, S, H) of a backbone or its part, for `input_ids` (B, S) or `inputs_embeds` (B, S, H).

    Those of padding are arbitrary: a fast backbone (`src.kernels`) may skip the padding.
    """
    fast = getattr(backbone, "fast_pass", None)
    if fast is not None and fast.saves_time(backbone, mask):
        states: Tensor = fast.states(backbone, mask, **inputs)
        return states
    positions = position_ids(mask)
    states = backbone(attention_mask=mask.long(), position_ids=positions, use_cache=False, **inputs).last_hidden_state
    return states


def whole_sequence(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompt and response in one, (B, P + T) each."""
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], dim=1)
    return ids, torch.cat([rollout.prompt_mask, rollout.response_mask], dim=1)


def at_actions(hidden: Tensor, rollout: Rollout) -> Tensor:
    """The hidden states (B, T, H) of s_t, the text before response token t: positions P-1 .. P+T-2 of (B, P + T, H)."""
    return hidden[:, rollout.prompt_ids.shape[1] - 1 : -1]


def sequence_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The score head's output at the last counted token of each row, found by position, never by padding id.

    Shapes: ids, mask (B, S), padded on either side -> (B,).
    """
    if not hasattr(model, "score"):
        # an encoder reads the score at its first token, so its padding must be on the right
        order = mask.long().argsort(dim=1, descending=True, stable=True)
        return model(input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order).long()).logits.squeeze(-1)
    return head_at_end(model.score, hidden_states(model, ids, mask), mask)


def head_at_end(head: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    """A score head's output at the last counted token. Shapes: hidden (B, S, H), mask (B, S) -> (B,)."""
    rows = torch.arange(mask.shape[0], device=mask.device)
    at_end = hidden[rows, last_counted(mask)]
    return scalar(head, at_end)


def scalar(head: nn.Module, hidden: Tensor) -> Tensor:
    """One number per state, in the dtype of the head's weights, also under autocast. (..., H) -> (...)."""
    with torch.autocast(hidden.device.type, enabled=False):
        number: Tensor = head(hidden.to(next(head.parameters()).dtype)).squeeze(-1)
    return number


@contextmanager
def gradient_checkpointing(lm: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Recompute the layers' activations in the backward pass instead of keeping them.

    transformers does so only in training mode. That mode is set on the layer modules only, so their dropouts stay in
    eval mode and the recomputed numbers are the same.
    """
    if not enabled:
        yield
        return
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [layer.training for layer in layers]
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
        lm.gradient_checkpointing_disable()


def next_token_logprobs(
    lm: PreTrainedModel, ids: Tensor, mask: Tensor, counted: Tensor | None = None, *, checkpointing: bool = False
) -> Tensor:
    """log p(x_t | x_<t) of the tokens in `counted` (None: all of `mask`) that have one before them.

    Shapes: (B, S) -> (N,) nats.
    """
    predicts = mask[:, :-1] & (mask if counted is None else counted)[:, 1:]
    with gradient_checkpointing(lm, checkpointing and torch.is_grad_enabled()):
        hidden = hidden_states(lm, ids, mask)[:, :-1][predicts]
    return token_logprobs(plain_head(lm.get_output_embeddings()), hidden, ids[:, 1:][predicts])[0]
