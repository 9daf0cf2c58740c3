"""What can be wrong with prompts, before any of them is answered."""

from __future__ import annotations

from src.data.modules import PromptData
from src.data.rows import rows_of
from src.models.text import encode_prompts
from src.utils.check import Check, checked

LOOKED_AT = 512  # prompts of the train split


def prompt_lengths(data: PromptData) -> Check:
    """How many prompts lose their beginning to `max_prompt_tokens`; a fault if half of them or more do."""
    prompts = [row.prompt for row in rows_of(data.corpus, "prompts", "train")[:LOOKED_AT]]
    lengths = [len(row) for row in encode_prompts(data.tokenizer, prompts)]
    limit, cut = data.max_prompt_tokens, sum(length > data.max_prompt_tokens for length in lengths)
    return checked(
        "prompt length",
        f"{cut} of {len(lengths)} prompts are longer than {limit} tokens and lose their beginning; the longest has "
        f"{max(lengths)}",
        "a larger rollout.max_prompt_tokens, or drop such rows by data.max_prompt_tokens",
        fault=2 * cut >= len(lengths),
        warning=cut > 0,
    )
