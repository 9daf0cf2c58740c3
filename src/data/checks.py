"""What can be wrong with prompts, before any of them is answered."""

from __future__ import annotations

from src.data.lengths import cut_rows
from src.data.modules import PromptData
from src.data.rows import rows_of
from src.models.text import encode_prompts
from src.utils.check import Check, checked


def prompt_lengths(data: PromptData) -> Check:
    """How many prompts, of training and of the comparison, lose their beginning; a fault if half or more do."""
    rows = [*rows_of(data.corpus, "prompts", "train"), *rows_of(data.corpus, "prompts", "test")[: data.eval_prompts]]
    lengths = [len(ids) for ids in encode_prompts(data.tokenizer, [row.prompt for row in rows])]
    limit, cut = data.max_prompt_tokens, sum(length > data.max_prompt_tokens for length in lengths)
    return checked(
        "prompt length",
        cut_rows("prompts", lengths, limit, "beginning"),
        "a larger rollout.max_prompt_tokens, or drop such rows by data.max_prompt_tokens",
        fault=2 * cut >= len(lengths),
        warning=cut > 0,
    )
