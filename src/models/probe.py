"""What a language model must be for this project, tried on two rows of three tokens when it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from src.errors import ModelError
from src.models.forward import hidden_states
from src.models.head_function import PLAIN, candidates

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; half precision:
HALF_ROUNDING = 2e-2


@torch.no_grad()
def probe(lm: PreTrainedModel) -> PreTrainedModel:
    """The same model, its vocabulary head with the function that follows it (`src.models.head_function`).

    Raises `ModelError` for a model whose tokens see later tokens, whose past rollouts cannot keep, or whose logits are
    not a known function of the head's.
    """
    ids = torch.tensor([[0, 1, 2], [0, 1, 0]], device=lm.device)
    mask = torch.ones_like(ids)
    output = lm(input_ids=ids, attention_mask=mask, use_cache=True)
    where = f"{lm.name_or_path!r}: {type(lm).__name__}"
    if output.logits.isnan().any():
        raise ModelError(f"{where} gives NaN: one of its weights is no finite number, or too large for {lm.dtype}")
    if not _close(output.logits[0, :2], output.logits[1, :2]):
        raise ModelError(f"{where} lets a token see those after it, so it is no model that writes from left to right")
    _require_cache(output, where)
    head = lm.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ModelError(f"{where} has no vocabulary head of one matrix, which is not supported")
    z = head(hidden_states(lm, ids, mask.bool())).to(torch.promote_types(output.logits.dtype, torch.float32))
    found = next((f for f in candidates(lm.config) if _close(f(z), output.logits)), None)
    if found is None:
        raise ModelError(
            f"{where} changes its logits after the head in a way that config.json does not say, which is not supported"
        )
    if found != PLAIN:
        head.function = found
    return lm


def _require_cache(output: ModelOutput, where: str) -> None:
    """Raise `ModelError` unless the model keeps the past in transformers' own cache."""
    past = output.get("past_key_values", output.get("cache_params"))
    if type(past) is not DynamicCache:
        keeps = "keeps no past between tokens" if past is None else f"keeps the past in a {type(past).__name__}"
        raise ModelError(f"{where} {keeps}, and rollouts need the cache of transformers (DynamicCache)")


def _close(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the second one's dtype."""
    rounding = ROUNDING.get(y.dtype, HALF_ROUNDING)
    x, y = x.double(), y.double()
    return bool((x - y).abs().max() <= rounding * y.abs().max())
