"""Texts for the language-model losses: token ids, and which of them count."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.core.padding import pad_left
from src.data.lengths import say_cut
from src.data.loaders import StreamLoader
from src.data.rows import rows_of
from src.errors import DataError
from src.models.text import encode_with_end, response_lengths
from src.types import Corpus


class EncodedText(NamedTuple):
    """The token ids of a text, ended by the end token; the loss counts the last `counted` of them."""

    ids: list[int]
    counted: int


def encoded_texts(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, split: str, max_tokens: int, answers_only: bool, rows: int
) -> list[EncodedText]:
    """The first `rows` texts of a split, cut to `max_tokens`; with `answers_only` what follows the prompt counts.

    Says how many are cut. Raises `DataError` with `answers_only` when texts and prompts of the corpus do not belong
    together, or when an answer begins after the cut.
    """
    texts = list(rows_of(corpus, "texts", split)[:rows])
    encoded = encode_with_end(tokenizer, texts)
    lengths = list(map(len, encoded))
    say_cut(f"texts of the split {split}", lengths, max_tokens, "end")
    if answers_only:
        lengths = response_lengths(tokenizer, _prompts(corpus, split, texts), encoded, chat_template=False)
    cut = [EncodedText(row[:max_tokens], n - len(row[max_tokens:])) for row, n in zip(encoded, lengths, strict=True)]
    without = sum(text.counted < 1 for text in cut)
    if without:
        raise DataError(
            f"sft.max_tokens={max_tokens}: the answers of {without} of {len(cut)} texts of the split {split} begin "
            f"after it, and sft.answers_only=true counts nothing else: raise it"
        )
    return cut


def _prompts(corpus: Corpus, split: str, texts: list[str]) -> list[str]:
    """The prompt with which each text begins."""
    prompts = [row.prompt for row in rows_of(corpus, "prompts", split)[: len(texts)]]
    for number, text in enumerate(texts):
        if number >= len(prompts) or not text.startswith(prompts[number]):
            raise DataError(
                f"sft.answers_only=true: text {number + 1} of the split {split} does not begin with the prompt of the "
                f"same number ({type(corpus).__name__}.texts and .prompts); use sft.answers_only=false"
            )
    return prompts


def text_stream(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, batches: int, max_tokens: int, seed: int,
    answers_only: bool = False,
) -> StreamLoader[EncodedText]:  # fmt: skip
    """Training texts, tokenized once."""
    rows = len(rows_of(corpus, "texts", "train"))
    texts = encoded_texts(corpus, tokenizer, "train", max_tokens, answers_only, rows)
    collate = partial(collate_texts, tokenizer.pad_token_id)
    return StreamLoader(texts, collate, batch_size=batch_size, batches=batches, seed=seed, stream="texts")


def collate_texts(pad_id: int, rows: list[EncodedText], indices: list[int]) -> dict[str, Any]:
    """{ids, mask, counted}, all (B, S): `counted` marks the tokens whose loss counts."""
    ids, mask = pad_left([row.ids for row in rows], pad_id)
    from_end = torch.arange(ids.shape[1], 0, -1)
    counted: Tensor = (from_end <= torch.tensor([row.counted for row in rows]).unsqueeze(1)) & mask
    return {"ids": ids, "mask": mask, "counted": counted}
