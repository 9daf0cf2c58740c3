"""Output of a command: this project's log on standard output, without messages of the libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

import huggingface_hub
import transformers

from src.errors import without_secrets
from src.utils.terminal import shown, wrapped


class _Stdout(logging.StreamHandler[TextIO]):
    """Writes to the present `sys.stdout`, which tests and notebooks replace."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = shown(without_secrets(super().format(record)))
        return wrapped(text) if self.stream.isatty() else text


def set_up_output() -> None:
    """Print what `src` logs, one line each; hide tips, banners, bars and warnings of the libraries."""
    news = logging.getLogger("src")
    if not any(isinstance(handler, _Stdout) for handler in news.handlers):
        news.addHandler(_Stdout())
    news.setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(lightning|peft|transformers)\.")
