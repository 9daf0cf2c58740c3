"""The page of decisions is what the code computes, and names only projects that it lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from src.core.masking import whiten
from tests.conformance import example
from tests.conformance.page import QUESTIONS, SOURCES, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_code_does() -> None:
    assert (ROOT / "docs/conformance.md").read_text(encoding="utf-8") == page(), "run python -m tests.conformance"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.title)
def test_each_question_has_different_answers(question) -> None:
    """No project answers twice, and the choices of the example give different numbers."""
    names = [name for answer in question.choices.values() for name in answer.split()]
    assert len(set(names)) == len(names)
    assert set(names) <= set(SOURCES)
    cases = re.split(r"; ", question.effect().partition(": ")[2] or question.effect())
    assert len(set(re.findall(r"-?\d+\.\d\d", " ".join(cases)))) >= (
        1 if question.title == "range of the scores" else 2
    )


def test_the_example_by_hand() -> None:
    """GAE of response 2, whose last token has the score and its part of the KL; then lambda 0.95 back."""
    last = -0.5 - 0.1 * 0.4 - (-0.2)
    first = -0.1 * 0.1 + (-0.2) - 0.0 + 0.95 * last
    assert example.advantages()[1, :2].tolist() == pytest.approx([first, last])
    whitened = whiten(example.advantages(), example.MASK)[example.MASK]
    assert float(whitened.std(correction=1)) == pytest.approx(1, abs=1e-6)
    n = torch.tensor(5.0).double()
    assert float((whitened * (n / (n - 1)).sqrt()).std(correction=0)) == pytest.approx((5 / 4) ** 0.5 * (4 / 5) ** 0.5)
