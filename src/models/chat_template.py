"""Messages as text: a chat template, which may be anybody's, rendered up to a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

LONGEST = 10_000_000  # characters: what prints more prints without end


def render(
    template: str, messages: list[dict[str, Any]], opens: bool, tokenizer: PreTrainedTokenizerBase | None, **own: Any
) -> str:
    """The messages as text; `opens`: up to where an answer begins. `own`: further variables of the template.

    Raises whatever the template raises.
    """
    chat_template_utils._compile_jinja_template(template).environment.concat = joined  # cached: the one used below
    special: dict[str, Any] = {} if tokenizer is None else tokenizer.special_tokens_map
    rendered: Any = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=opens, **(special | own)
    )
    return str(rendered[0][0])  # of the one chat


def adopt(tokenizer: PreTrainedTokenizerBase, corpus: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template that wrote the prompts of a corpus, if one did."""
    used = getattr(corpus, "chat_template", None)
    if used is not None and not (tokenizer.chat_template and tokenizer.get_chat_template() == used):
        tokenizer.chat_template = used
    return tokenizer


def joined(pieces: Iterable[str]) -> str:
    """What a template prints as one text. Raises `TemplateError` when it prints without end."""
    parts, length = [], 0
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise TemplateError(f"it prints more than {LONGEST:,} characters")
    return "".join(parts)
