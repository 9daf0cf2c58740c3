"""From text to token ids and back."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.models.chat_template import own_template, render
from src.models.endings import Endings, endings


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True) -> list[list[int]]:
    """The token ids of texts that are to be continued: without what some tokenizers put after every text.

    `special`: with what the tokenizer puts before a text.
    """
    rows = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"] if texts else []
    closing = _closing(tokenizer) if special and texts else 0
    return [row[: len(row) - closing] for row in rows]


def _closing(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts after a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = [i for i in range(len(whole) - len(bare) + 1) if bare and whole[i : i + len(bare)] == bare]
    return len(whole) - len(bare) - starts[0] if starts else 0


def encode_with_end(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True) -> list[list[int]]:
    """The token ids of each text, ended by exactly one end token; `special`: with the tokenizer's special tokens."""
    ends = endings(tokenizer)
    rows = encode_prompts(tokenizer, texts, special)
    return [ends.closed(row, text) for row, text in zip(rows, texts, strict=True)]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str], chat_template: bool
) -> list[list[int]]:
    """The token ids of each prompt with its response, ended by exactly one end token, as a reward model reads them.

    With `chat_template` the prompt is a user's message and the response the assistant's, in the tokenizer's template.
    """
    if not chat_template:
        return encode_with_end(tokenizer, [p + r for p, r in zip(prompts, responses, strict=True)])
    chats = [[*user_message(p), {"role": "assistant", "content": r}] for p, r in zip(prompts, responses, strict=True)]
    after = endings(tokenizer).after
    texts = [render(str(own_template(tokenizer)), chat, False, tokenizer).removesuffix(after) for chat in chats]
    return encode_with_end(tokenizer, texts, special=False)


def response_lengths(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], rows: list[list[int]], chat_template: bool
) -> list[int]:
    """How many tokens at the end of each row (of `encode_completions`) belong to the response, with the end token.

    The prompt's tokens are the longest common start of the encoded prompt and the row: a token that spans the border
    belongs to the response.
    """
    if chat_template:
        chats = [user_message(prompt) for prompt in prompts]
        prompts = [render(str(own_template(tokenizer)), chat, True, tokenizer) for chat in chats]
    alone = encode_prompts(tokenizer, prompts, special=not chat_template)
    return [len(row) - shared_length(prompt, row) for prompt, row in zip(alone, rows, strict=True)]


def user_message(prompt: str) -> list[dict[str, str]]:
    """A chat of one user message."""
    return [{"role": "user", "content": prompt}]


def shared_length(row: list[int], other: list[int]) -> int:
    """The length of the longest common start of two rows."""
    same = [a == b for a, b in zip(row, other, strict=False)]
    return same.index(False) if False in same else len(same)


def shorten(row: list[int], limit: int | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `limit` tokens of a row (None: all); an opening token (`bos`, `cls`) stays the first."""
    if limit is None or len(row) <= limit:
        return row
    opens = row[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
    return [row[0], *row[len(row) - limit + 1 :]] if opens else row[len(row) - limit :]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """The text of a row of ids, without special tokens, with spaces unchanged."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def response_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Tensor, response_ids: Tensor, ends: Endings | None = None
) -> str:
    """The response's text: decode(prompt + response) without decode(prompt), and without the token of `ends`.

    Decoding the response alone would lose its leading space with some tokenizers.
    """
    prompt, own = decode(tokenizer, prompt_ids), response_ids.tolist()
    response = prompt_ids.new_tensor(own if ends is None else ends.without_end(own))
    whole = decode(tokenizer, torch.cat([prompt_ids, response]))
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(tokenizer, response)
