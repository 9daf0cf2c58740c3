"""The checklist page names the tests there are."""

from __future__ import annotations

from tests.checklist import ITEMS, PAGE, page, shown_by


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.checklist`"


def test_every_item_has_a_test() -> None:
    assert set(shown_by()) == set(ITEMS)
