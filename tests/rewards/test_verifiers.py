"""Verifiers against verdicts written down by hand, and numbers against `fractions.Fraction`."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import RewardError, SettingError
from src.rewards.verifiers import ExactMatch, NumericMatch, last_number
from src.rollout.scoring import Scorer
from tests.tiny import ragged_rollout


def exact(response: str, answer: Any) -> float:
    return ExactMatch("answer").score(["p"], [response], [{"answer": answer}])[0]


def numeric(response: str, answer: Any, marker: str = "", tolerance: float = 0.0) -> float:
    return NumericMatch("answer", marker, tolerance).score(["p 7"], [response], [{"answer": answer}])[0]


# --------------------------------------------------------------------------------------------------------- exact match


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris", 1),
        ("Paris", "  Paris ", 1),
        ("Paris", "paris", 0),
        ("Paris.", "Paris", 0),
        ("New  York", "New York", 0),
        ("42", 42, 1),
        ("42.0", 42, 0),
        ("2.5", 2.5, 1),
        ("True", True, 1),
        ("", "", 1),
        ("", "Paris", 0),
        ("東京\u3000", "東京", 1),
    ],
)
def test_exact_match_knows_white_space_at_the_ends_only(response: str, answer: Any, expected: int) -> None:
    """An answer that is no text is compared as Python writes it."""
    assert exact(response, answer) == expected


def test_each_response_is_compared_with_its_own_row() -> None:
    responses, rows = ["1", "2", "3", "1"], [{"gold": n, "answer": 9} for n in (1, 3, 2, 1)]
    for reward in (ExactMatch("gold"), NumericMatch("gold", "", 0.0)):
        assert reward.score(["p"] * 4, responses, rows) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("reward", [ExactMatch("gold"), NumericMatch("gold", "", 0.0)], ids=["exact", "numeric"])
def test_a_missing_column_names_those_there_are(reward: Any) -> None:
    with pytest.raises(RewardError, match="no column 'gold', only answer, finished"):
        reward.score(["p"] * 2, ["1", "1"], [{"gold": 1}, {"finished": True, "answer": 1}])
    with pytest.raises(RewardError, match="no column 'gold', only none"):
        reward.score(["p"], ["1"], [{}])


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("42.", "42"),
        ("It is 42.", "42"),
        ("3 and 4, so 7!", "7"),
        ("1,234", "1234"),
        ("$1,234.50", "1234.5"),
        ("1,234,567.", "1234567"),
        ("12,34", "34"),
        ("the numbers 1,2345", "2345"),
        ("-5", "-5"),
        ("x=-0.25", "-0.25"),
        ("-$5", "-5"),
        ("-$1,234.50", "-1234.5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("+3", "3"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("0.10", "0.1"),
        ("007", "7"),
        ("50%", "50"),
        ("1e5", "100000"),
        ("1e-05", "0.00001"),
        ("2.5E+3 m", "2500"),
        ("3 each", "3"),
        ("٣", "3"),
        ("１２", "12"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    """Thousands, decimals, signs, currencies, exponents, and a full stop after the number."""
    found = last_number(text, "")
    assert found is not None
    assert Fraction(found) == Fraction(number)
    assert numeric(text, number) == 1
    assert numeric(text, str(Decimal(number) + 1)) == 0


@pytest.mark.parametrize("text", ["", "none", "²", "½", "-", "$", ".", ",", "e", "####", "五"])
def test_a_text_without_a_number(text: str) -> None:
    """A response without one is wrong; a reference without one cannot judge."""
    assert numeric(text, "0") == 0
    assert math.isnan(numeric("6", text))


@pytest.mark.parametrize("answer", [None, [], "none", float("nan"), True])
def test_a_reference_that_is_no_number_at_all(answer: Any) -> None:
    assert math.isnan(numeric("1", answer))


def test_a_row_without_a_number_is_named_or_left_out_and_the_others_are_judged() -> None:
    rollout = replace(ragged_rollout(rows=3), responses=("1", "2", "3"))
    rollout = replace(rollout, metadata=({"answer": 1}, {"answer": "unknown"}, {"answer": 4}))
    reward = NumericMatch("answer", "", 0.0)
    scored = Scorer(timeout=None, drop_failed=True).score(reward, rollout)
    assert (scored.dropped, scored.scores.tolist(), scored.rollout.responses) == (1, [1.0, 0.0], ("1", "3"))
    with pytest.raises(RewardError, match="reward NumericMatch gave nan for prompt 'p1', response '2'"):
        Scorer(timeout=None, drop_failed=False).score(reward, rollout)


@pytest.mark.parametrize(
    ("response", "answer", "marker", "expected"),
    [
        ("2 + 3 = 5\n#### 5", "so 2 and 3\n#### 5", "####", 1),
        ("#### 5 (of 6)", "#### 6", "####", 1),
        ("#### 5\n", "#### 6", "####", 0),
        ("5 #### none", "#### 5", "####", 0),
        ("#### 4 #### 5", "#### 5", "####", 1),
        ("it is 5", "#### 5", "####", 1),
        ("it is 5", "5", "####", 1),
        ("####5", "#### 5.0", "####", 1),
        ("#### $1,200", "#### 1200", "####", 1),
        ("#### 5 and 6", "6", "", 1),
        ("A: 5", "Answer: 5", "A:", 1),
    ],
)
def test_only_what_follows_the_last_marker_is_read(response: str, answer: str, marker: str, expected: int) -> None:
    """In GSM8K "####" comes before the answer; a text without it is read whole."""
    assert numeric(response, answer, marker) == expected


@pytest.mark.parametrize("answer", [5, 5.0, "5", "5.00", "x = 5", "0005"])
def test_equal_numbers_are_equal_however_they_are_written(answer: Any) -> None:
    assert [numeric(text, answer) for text in ("5", "5.0", "4.9999999", "-5")] == [1, 1, 0, 0]


@pytest.mark.parametrize("answer", [1e-05, 1e16, 123456.75, -2.5e-7, 0.1])
def test_a_reference_that_is_a_float_is_the_number_that_it_shows(answer: float) -> None:
    """Python writes the small and the large with an exponent."""
    plain = format(Decimal(repr(answer)), "f")
    assert numeric(f"= {plain}", answer) == 1
    assert numeric(f"= {plain}1" if "." in plain else f"= {plain}.1", answer) == 0


@pytest.mark.parametrize(
    ("response", "tolerance", "expected"),
    [("0.3", 0.1, 1), ("0.1", 0.1, 1), ("0.31", 0.1, 0), ("0.2", 0.0, 1), ("0.2000001", 0.0, 0), ("-0.2", 0.4, 1)],
)
def test_the_tolerance_belongs_to_the_range_and_has_no_rounding(response: str, tolerance: float, expected: int) -> None:
    """In floats |0.3 - 0.2| is less than 0.1, and |0.1 - 0.2| is not."""
    assert numeric(response, 0.2, tolerance=tolerance) == expected


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_a_tolerance_that_nothing_can_keep_is_refused(tolerance: float) -> None:
    with pytest.raises(SettingError, match="tolerance must be at least 0"):
        NumericMatch("answer", "", tolerance)


# ---------------------------------------------------------------------------------------------------------------- fuzz

TEXTS = st.text(max_size=30) | st.text(alphabet="0123456789.,+-−eE$€# ٣²", max_size=30)
ANSWERS = TEXTS | st.integers() | st.floats() | st.none() | st.lists(st.integers(), max_size=2)


@settings(deadline=None, max_examples=300)
@given(response=TEXTS, answer=ANSWERS, marker=st.sampled_from(["", "####", "."]), tolerance=st.floats(0, 10))
def test_whatever_is_written_gives_0_or_1_or_nan(response: str, answer: Any, marker: str, tolerance: float) -> None:
    """And a reference that holds a number agrees with itself."""
    assert exact(response, answer) in (0, 1)
    assert exact(str(answer), answer) == 1
    if last_number(str(answer), marker) is None:
        assert math.isnan(numeric(response, answer, marker, tolerance))
    else:
        assert numeric(response, answer, marker, tolerance) in (0, 1)
        assert numeric(str(answer), answer, marker) == 1


@settings(deadline=None, max_examples=150)
@given(number=st.integers(-(10**12), 10**12), places=st.integers(0, 4), words=st.sampled_from(["", "1 + 1 = "]))
def test_numbers_as_python_formats_them_are_read_back(number: int, places: int, words: str) -> None:
    """With and without thousands separators."""
    exactly = Decimal(number) / 10**places
    for written in (format(exactly, "f"), format(exactly, ",f")):
        found = last_number(f"{words}{written}.", "")
        assert found is not None
        assert Fraction(found) == Fraction(number, 10**places)
