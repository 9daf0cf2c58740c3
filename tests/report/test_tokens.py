"""The samples of the token view, and texts with what a browser would obey or hide."""

from __future__ import annotations

import json

import pytest

from src.report.tokens import _spread, token_view
from src.report.visible import visible
from tests.report.runs import QUANTITIES, sample


@pytest.mark.parametrize(("count", "order"), [(0, []), (1, [0]), (2, [0, 1]), (5, [0, 4, 2, 1, 3])])
def test_both_ends_come_first_then_the_middle_of_the_largest_gap(count, order):
    assert _spread(count) == order


def test_all_samples_are_shown_where_they_fit():
    samples = [sample(i, row, [" a", " b"]) for i in (1, 20, 40) for row in range(2)]
    view = token_view(samples)
    assert [table["iteration"] for table in view["tables"]] == [1, 20, 40]
    assert view["left_out"] == 0
    assert view["tables"][2]["rows"][1]["tokens"] == samples[5]["tokens"]
    assert {q["name"] for q in view["quantities"]} == set(QUANTITIES)


@pytest.mark.parametrize("most", [30_000, 8_000])
def test_the_first_and_the_last_are_kept_and_the_size_is(most):
    """Rows are dropped before the two ends are."""
    samples = [sample(i, row, [" word"] * 20) for i in range(1, 31) for row in range(8)]
    view = token_view(samples, most_bytes=most)
    iterations = [table["iteration"] for table in view["tables"]]
    assert iterations[0] == 1
    assert iterations[-1] == 30
    assert len(json.dumps(view["tables"])) < most * 1.1
    assert view["left_out"] == 240 - sum(len(table["rows"]) for table in view["tables"]) > 0


def test_a_run_without_a_critic_has_no_value_to_choose():
    lacking = sample(1, 0, [" a"])
    del lacking["tokens"]["value"]
    assert "value" not in {q["name"] for q in token_view([lacking])["quantities"]}


def test_letters_of_all_languages_stay_and_signs_stand_for_the_rest():
    kept = "naïve 你好 שלום 👩\u200d🚀 क\u094dष\ttab\nline"
    assert visible(kept) == kept
    assert visible("\x1b[0m\r\x07\x7f\u202e\u2066\ufeff\ud800") == "␛[0m␍␇␡\\u202e\\u2066\\ufeff\\ud800"
