"""Lines for a terminal."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from src.chat.repl import Stream
from src.rollout.evaluation import Answers, Evaluation
from src.runs.report import examples_table
from src.utils.output import _Stdout
from src.utils.terminal import say, shown, wrapped
from tests.tiny import tokenizer

PATH = "logs/pipeline/experiment-quick_reward-function/ppo/curves.png"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_lines_break_at_spaces_alone(width: int) -> None:
    text = f"the picture of a run lies in {PATH}, which is longer than some lines\n  indented: {PATH} and some words"
    lines = wrapped(text, width).split("\n")
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
    assert " ".join(wrapped(text, width).split()) == " ".join(text.split())
    assert sum(PATH in line for line in lines) == 2


def test_what_fits_is_left_as_it_is() -> None:
    text = "results in logs\n  a.json, b.csv\n\nnext\n    x  y"
    assert wrapped(text, 40) == text


def test_what_follows_in_an_indented_line_is_indented_further() -> None:
    assert wrapped("  one two three", 9) == "  one two\n    three"


def test_a_file_gets_the_text_unchanged() -> None:
    stream = io.StringIO()
    say("word " * 40, stream)
    assert stream.getvalue() == "word " * 40 + "\n"


EVIL = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08 :smile: [bold]b[/] \u202eturned \ud83c \u4f60\u597d \U0001f3ac\n\tend"
SEEN = r"a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08 :smile: [bold]b[/] \u202eturned \ud83c 你好 🎬"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert shown(EVIL) == f"{SEEN}\n\tend"
    assert shown("naïve é 夜 👩\u200d🚀 \xa0") == "naïve é 夜 👩\u200d🚀 \xa0"
    stream = io.StringIO()
    say(f"error: the reward cannot score {EVIL}", stream)
    assert stream.getvalue() == f"error: the reward cannot score {SEEN}\n\tend\n"


def test_generated_text_reaches_tables_chat_and_log_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither escapes nor `:emoji:` codes nor markup."""
    answers = Answers(("p",), (EVIL.strip(),), {"score": [1.0]})
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(examples_table(Evaluation(answers, answers), 1))
    Stream(tokenizer(), console).on_finalized_text(EVIL, stream_end=True)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count(SEEN) == 3
    assert not set("\x1b\x07\x08\x9b\u202e") & set(written)
    record = logging.LogRecord("src", logging.INFO, "", 0, "dropped: %s", (EVIL,), None)
    assert _Stdout().format(record) == f"dropped: {SEEN}\n\tend"
