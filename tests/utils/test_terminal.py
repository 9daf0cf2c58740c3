"""Lines for a terminal."""

from __future__ import annotations

import io

import pytest

from src.utils.terminal import say, wrapped

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
