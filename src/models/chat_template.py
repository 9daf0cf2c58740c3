"""Messages as text: a chat template, which may be anybody's, rendered up to a limit."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

TODAY = datetime(2024, 7, 26)  # of a template that writes the date: a run of two days must not mix two prompts
LONGEST = 10_000_000  # characters: what prints more prints without end


def render(
    template: str, messages: list[dict[str, Any]], opens: bool, tokenizer: PreTrainedTokenizerBase | None, **own: Any
) -> str:
    """The messages as text; `opens`: up to where an answer begins. `own`: further variables of the template.

    Its clock stands still at `TODAY`. Raises whatever the template raises.
    """
    environment = chat_template_utils._compile_jinja_template(template).environment  # cached: the one used below
    environment.concat, environment.globals["strftime_now"] = joined, TODAY.strftime
    special: dict[str, Any] = {} if tokenizer is None else tokenizer.special_tokens_map
    rendered: Any = chat_template_utils.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=opens, **(special | own)
    )
    return str(rendered[0][0])  # of the one chat


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template, the default one of several; None without one."""
    own: Any = tokenizer.chat_template  # a text, or texts by name
    found = own.get("default") if isinstance(own, dict) else own
    return str(found) if found else None


def adopt(tokenizer: PreTrainedTokenizerBase, corpus: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template that wrote the prompts of a corpus, if one did."""
    used = getattr(corpus, "chat_template", None)
    if used is not None and own_template(tokenizer) != used:
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
