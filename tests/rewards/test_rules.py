"""Rules on the text of a response against verdicts written down by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import SettingError
from src.rewards.rules import KeywordReward, LengthReward, RegexReward


def scores(reward: Any, *responses: str) -> list[float]:
    """Of responses to prompts that hold every word and match every pattern: only the response may count."""
    return reward.score(["good fine cast 42"] * len(responses), list(responses), [{}] * len(responses))


@pytest.mark.parametrize(
    ("word", "held", "lacking"),
    [
        ("good", ["good", "a GOOD film", "Good.", "so-good!", "(good)", "\ngood\n"], ["goods", "no_good", "goo d", ""]),
        ("c++", ["in c++ .", "C++", "c++-like", "(c++)"], ["c+", "ccc", "xc++", "c++x", "c++11"]),
        ("a.b", ["a.b", "A.B."], ["axb", "a.bc", "ab"]),
        ("(", ["f (", "( x"], ["f(x", ")"]),
        ("[a-z]*", ["[a-z]*"], ["abc", "a"]),
        ("Ärger", ["viel ÄRGER!", "ärger"], ["Ärgernis", "arger", "verärger"]),
        ("ночь", ["НОЧЬ .", "ночь"], ["ночью", "полночь"]),
        ("very good", ["a very good film", "VERY GOOD"], ["very  good", "very goods", "good very"]),
    ],
)
def test_a_keyword_is_a_whole_word_in_any_case(word: str, held: list[str], lacking: list[str]) -> None:
    """What would be regex syntax in it stands for itself; letters of any script count as letters."""
    assert scores(KeywordReward([word]), *held, *lacking) == [1.0] * len(held) + [0.0] * len(lacking)


def test_the_score_is_the_share_of_the_keywords_in_order() -> None:
    """Twice the same word in a response counts once."""
    reward = KeywordReward(["good", "fine", "cast", "plot"])
    responses = ["good good good", "a fine plot , a good cast", "nothing", "Fine: the cast, the end, good"]
    assert scores(reward, *responses) == [0.25, 1.0, 0.0, 0.75]


@pytest.mark.parametrize("words", [[], [""], ["good", ""], "good", [42], [True, "good"]])
def test_keywords_that_are_no_list_of_words_are_refused(words: Any) -> None:
    """A bare text would be taken letter by letter."""
    with pytest.raises(SettingError, match="keywords must be a list of at least one word"):
        KeywordReward(words)


@pytest.mark.parametrize("target", [1, 4, 12])
def test_length_counts_words_between_white_space(target: int) -> None:
    responses = {"": 0, "  \n\t ": 0, "one": 1, " one  two\nthree ": 3, "don't stop , ever": 4, "é ñ\u00a0ü": 3}
    found = scores(LengthReward(target), *responses)
    assert found == pytest.approx([-abs(words - target) / target for words in responses.values()])
    assert found[0] == -1


def test_length_falls_on_both_sides_of_the_target() -> None:
    lengths = range(1, 21)
    found = scores(LengthReward(10), *("word " * n for n in lengths))
    assert [n for n, score in zip(lengths, found, strict=True) if score == max(found) == 0] == [10]
    assert found[:10] == sorted(found[:10])
    assert found[9:] == sorted(found[9:], reverse=True)


@pytest.mark.parametrize("target", [0, -3])
def test_a_target_without_words_is_refused(target: int) -> None:
    with pytest.raises(SettingError, match="target_words must be at least 1"):
        LengthReward(target)


@pytest.mark.parametrize(
    ("whole", "expected"), [(False, [2.0, 2.0, 2.0, -1.0, -1.0]), (True, [2.0, -1.0, -1.0, -1.0, -1.0])]
)
def test_regex_searches_or_takes_the_whole(whole: bool, expected: list[float]) -> None:
    responses = ["yes: 12", "well , yes: 12", "yes: 12\n", "Yes: 12", ""]
    assert scores(RegexReward(r"yes: \d+", whole, 2.0, -1.0), *responses) == expected


def test_flags_inside_a_pattern_hold() -> None:
    assert scores(RegexReward(r"(?is)begin.*end", True, 1.0, 0.0), "BEGIN\nEnd", "begin") == [1.0, 0.0]


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<x", r"a{2,1}", "a{99999999999999}", "(" * 20_000, 42, None])
def test_a_pattern_that_is_none_is_refused_by_name(pattern: Any) -> None:
    """Also one that re gives up on with something else than its own error."""
    with pytest.raises(SettingError, match="pattern must be a regular expression of Python's re") as caught:
        RegexReward(pattern, False, 1.0, 0.0)
    assert repr(pattern) in str(caught.value)
    assert (caught.value.name, caught.value.value) == ("pattern", pattern)


@settings(deadline=None, max_examples=150)
@given(word=st.text(min_size=1, max_size=8), response=st.text(max_size=30))
def test_any_text_is_a_keyword_and_is_found_where_it_stands_alone(word: str, response: str) -> None:
    reward = KeywordReward([word])
    alone, other = scores(reward, f" {word} ", response)
    assert alone == 1.0
    assert other in (0.0, 1.0)
    if word.casefold() not in response.casefold() and re.escape(word).isascii() and response.isascii():
        assert other == 0.0


@settings(deadline=None, max_examples=150)
@given(pattern=st.text(alphabet="ab()[]{}*+?|\\^$.,09 -é", max_size=8), response=st.text(alphabet="ab09é ", max_size=6))
@pytest.mark.filterwarnings("ignore:Possible (nested set|set [a-z ]+):FutureWarning")  # re, of "[[", "--", "||"...
def test_any_pattern_is_a_rule_or_a_setting_error(pattern: str, response: str) -> None:
    try:
        expected = re.search(pattern, response) is not None
    except (re.error, OverflowError):
        with pytest.raises(SettingError, match="pattern must be a regular expression") as caught:
            RegexReward(pattern, False, 1.0, 0.0)
        assert repr(pattern) in str(caught.value)
    else:
        assert scores(RegexReward(pattern, False, 1.0, 0.0), response) == [float(expected)]
