"""Tokenizers made from a corpus, for models trained from scratch. All are lossless on their corpus."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

# A word with the space before it, one mark, or any other white space.
PIECE = r" ?[^\s.,!]+|[.,!]|\s"


def word_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words and marks of the texts.

    A token keeps the space before its word, so decoding is plain concatenation. The vocabulary holds each form that
    occurs in the texts and no other: "The" where a text begins with it, " The" and " the" where they follow a space.
    Ids: pad 0, eos 1, unk 2, then the forms in code point order. Anything else becomes `<unk>`.
    """
    forms = sorted({piece for text in texts for piece in re.findall(PIECE, text)} - {PAD, EOS, UNK})
    vocabulary = {form: index for index, form in enumerate([PAD, EOS, UNK, *forms])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    # Without a decoder, tokens would be joined by spaces.
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token=UNK)


def character_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the characters of the texts.

    Ids: pad 0, eos 1, unk 2, then the characters in code point order. Anything else becomes `<unk>`.
    """
    characters = sorted(set("".join(texts)))
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNK, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token=UNK)


def byte_level_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte pair encoding learned from the texts, lossless on any text.

    Ids: pad 0, eos 1, the 256 bytes, then the merges in the order learned: `vocab_size` tokens, or fewer when the
    texts are too few for so many merges.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes, pad, eos), but is {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer for use with transformers; it adds no special token on encoding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )
