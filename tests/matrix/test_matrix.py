"""docs/models.md says of every architecture in the table what is true of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.matrix.architectures import ARCHITECTURES
from tests.matrix.page import Served, measure, verdicts
from tests.tiny import FOREIGN_WARNINGS

# peft names the fused experts of both of its spellings, and wonders at the one that a model does not have
EXPERTS = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
pytestmark = [*FOREIGN_WARNINGS, EXPERTS]

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")


def test_the_page_has_every_architecture_and_serves_many() -> None:
    assert set(verdicts(PAGE)) == set(ARCHITECTURES)
    assert sum(verdicts(PAGE).values()) >= 45


def check(name: str, folder: Path) -> None:
    row = measure(name, folder)
    assert isinstance(row, Served) == verdicts(PAGE)[name], row
    assert isinstance(row, Served) or without_figures(f"| {name} | {row} |\n") in without_figures(PAGE)


def without_figures(text: str) -> str:
    """The text without decimal numbers, whose last digits differ from machine to machine."""
    return re.sub(r"\d+\.\d+", "#", text)


@pytest.mark.parametrize("name", ["mamba", "zamba2"])
def test_two_of_its_rows_are_true(name: str, tmp_path: Path) -> None:
    """One that is served, one that the run itself refuses."""
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_row_is_true(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
