"""From text to token ids and back."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def encode_with_end(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, ended by exactly one end token."""
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=True, return_attention_mask=False)["input_ids"] if texts else []
    return [row if row and row[-1] == end else [*row, end] for row in rows]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """The text of a row of ids, special tokens left out and spaces left alone."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def response_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: Tensor, response_ids: Tensor) -> str:
    """What the response adds to the prompt: decode(prompt + response) without decode(prompt).

    Decoding the response alone would lose its leading space with some tokenizers.
    """
    prompt = decode(tokenizer, prompt_ids)
    whole = decode(tokenizer, prompt_ids.new_tensor([*prompt_ids.tolist(), *response_ids.tolist()]))
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(tokenizer, response_ids)
