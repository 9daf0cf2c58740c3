"""A tokenizer with a chat template whose turns end with another token than its texts, and a model for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tests.tiny import tokenizer, write_lm

TURN, START = len(tokenizer()), len(tokenizer()) + 1  # ids of <turn|> and <|turn>
GEMMA = (
    "{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def chat_tokenizer(template: str | None = GEMMA) -> PreTrainedTokenizerBase:
    """The tokenizer of words with two special tokens more."""
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<turn|>", "<|turn>"]})
    made.chat_template = template
    return made


def write_chat_lm(folder: Path, template: str | None = GEMMA, **changes: Any) -> str:
    """A random language model with that tokenizer in a folder."""
    path = write_lm(folder, vocab_size=START + 1, **changes)
    chat_tokenizer(template).save_pretrained(path)
    return path
