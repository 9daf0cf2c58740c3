"""What a folder says of its tokenizer and transformers leaves out: the rules of its file, a processor's template."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from src.errors import ModelError
from src.models.accounting import LENIENT
from src.models.gguf import is_gguf
from src.utils.hub import for_hub

RULES, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.json", "processor_config.json", CONFIG)  # those of a processor first
SAMPLE = "The 12 films weren't good:\n\n  naïve, 1.50 € (你好) 🎬"
WORDS = 100  # of the vocabulary, which are read again


def class_of(path: str) -> type[Any]:
    """What loads the tokenizer: the class of its tokenizer.json alone where tokenizer_config.json names that one.

    Beside a Qwen2 and some others, AutoTokenizer takes the architecture's class whatever the folder says.
    """
    named = {} if is_gguf(path) else get_tokenizer_config(for_hub(path))
    return TokenizersBackend if named.get("tokenizer_class") == TokenizersBackend.__name__ else AutoTokenizer


def require_own_rules(tokenizer: PreTrainedTokenizerBase, path: str, key: str) -> None:
    """Raise `ModelError` if the tokenizer reads a text otherwise than the tokenizer.json in its folder.

    transformers takes only the vocabulary from that file, and the rules from the class that tokenizer_config.json or
    the architecture names. Some classes put a space before a text that has none, so one of both is to be the same.
    """
    file = cached_file(path, RULES, **LENIENT)
    if file is None or type(tokenizer) is TokenizersBackend or not isinstance(tokenizer, TokenizersBackend):
        return
    rules = Tokenizer.from_file(file)
    rules.no_truncation()
    rules.no_padding()
    words = rules.get_vocab_size()
    for text in (SAMPLE, rules.decode(list(range(0, words, -(-words // WORDS)))).strip()):
        pairs = [
            (rules.encode(t, add_special_tokens=False).ids, tokenizer(t, add_special_tokens=False)["input_ids"])
            for t in (text, f" {text}")
        ]
        if all(own != made for own, made in pairs):
            raise ModelError(
                f"the tokenizer at {path!r} ({key}) is loaded as a {type(tokenizer).__name__}, which reads texts "
                f'otherwise than its {RULES}: set "tokenizer_class": "TokenizersBackend" in its {CONFIG}'
            )


def adopt_processors_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a tokenizer without a chat template that of the processor in its folder, which transformers leaves out.

    Warns of one that is not used, as the tokenizer has another. Raises `ModelError` for a file without a text.
    """
    for name in TEMPLATES:
        file = cached_file(path, name, **LENIENT)
        found = None if file is None else _template_in(Path(file))
        if found is None or found == tokenizer.chat_template:
            continue
        if tokenizer.chat_template:
            warnings.warn(
                f"{path}: the chat template in {name} is not used, as the tokenizer has another; "
                f"data.chat_template=FILE chooses",
                stacklevel=2,
            )
        else:
            tokenizer.chat_template = found


def _template_in(file: Path) -> Any:
    """The chat template in a JSON file: a text, or texts by name; None without one."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        named = {one["name"]: one["template"] for one in found} if isinstance(found, list) else found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error!r:.120}") from error
    if named is not None and not isinstance(named, str | dict):
        raise ModelError(f"{file}: chat_template must be a text, but is {named!r:.80}")
    return named or None
