"""The checklist page names the tests there are."""

from __future__ import annotations

from tests.checklist import ITEMS, PAGE, page, shown_by

LATER = {21, 22, 23, 24, 25, 26, 27, 40, 48}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.checklist`"


def test_every_item_that_is_built_has_a_test() -> None:
    found = shown_by()
    assert set(found) <= set(ITEMS)
    assert set(ITEMS) - set(found) <= LATER
