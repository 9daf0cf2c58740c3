"""Rates of a machine: the fit on passes whose seconds are known, what is refused, and published figures."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.plan.__main__ import memory_of
from src.plan.machine import CARDS, Machine, card
from src.plan.measure import HERE, fitted
from src.plan.work import KINDS, Work

TRUE = {"products": 2e-11, "attention": 3e-11, "bytes": 1e-10, "elements": 4e-10, "calls": 1e-5, "steps": 2e-5,
        "updates": 1e-9}  # fmt: skip
LARGE = {"products": 1e10, "attention": 1e8, "bytes": 1e8, "elements": 1e7, "calls": 1e3, "steps": 1e3, "updates": 1e6}


def passes(true: dict[str, float]) -> list[tuple[Work, float]]:
    """Made up, with exactly these seconds per unit."""
    draw = random.Random(0)
    works = [Work(**{kind: draw.random() * LARGE[kind] for kind in HERE}) for _ in range(20)]
    return [(work, sum(true[kind] * amount for kind, amount in asdict(work).items() if kind in true)) for work in works]


def test_the_fit_finds_the_seconds_that_made_the_passes():
    assert fitted(passes(TRUE)) == pytest.approx(TRUE, rel=1e-6)


def test_the_fit_is_right_on_the_mean_where_passes_scatter():
    """Least squares of relative errors alone would be low: each of two kinds of pass is off by the same factor."""
    noisy = [(work, spent * (1.5 if i % 2 else 1 / 1.5)) for i, (work, spent) in enumerate(passes(TRUE))]
    found = fitted(noisy)
    ratios = [sum(found[k] * n for k, n in asdict(work).items() if k in found) / spent for work, spent in noisy]
    assert math.prod(ratios) == pytest.approx(1)


def test_no_kind_has_negative_seconds():
    """Where the best plain least squares would be negative, the kind costs nothing and the others make up for it."""
    found = fitted(passes(TRUE | {"elements": -4e-10}))
    assert found["elements"] == 0
    assert min(found.values()) >= 0
    assert found["products"] == pytest.approx(TRUE["products"], rel=0.2)


def test_seconds_are_the_sum_over_kinds_unless_launching_overlaps():
    work = Work(products=3, calls=5, sent=7)
    rates = {"float32": {"products": 2.0, "calls": 10.0, "sent": 100.0}}
    assert Machine("a", "", rates).time(work, "float32") == 3 * 2 + 5 * 10 + 7 * 100
    assert Machine("a", "", rates, overlaps=True).time(work, "float32") == max(3 * 2, 5 * 10) + 7 * 100


def test_a_rate_that_is_unknown_is_never_0():
    alone = Machine("here", "", {"float32": {"products": 1.0}})
    with pytest.raises(ConfigError, match="--link"):
        alone.time(Work(sent=1), "float32")
    assert alone.linked(10).time(Work(sent=1e10), "float32") == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"no rates for model\.dtype=bfloat16"):
        alone.time(Work(products=1), "bfloat16")
    with pytest.raises(ConfigError, match="no rate of calls"):
        alone.time(Work(calls=1), "float32")


def test_what_was_measured_is_read_again(tmp_path: Path):
    file = tmp_path / "rates" / "machine.json"
    machine = Machine("here", "measured", {"float32": TRUE})
    machine.save(file)
    assert Machine.load(file) == machine


@pytest.mark.parametrize("content", ["", "[]", '{"name": "a"}', '{"name": "a", "source": "", "seconds": {}, "x": 1}'])
def test_a_file_without_rates_is_refused_with_the_command(tmp_path: Path, content: str):
    file = tmp_path / "machine.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"machine\.json has no rates .*python -m src\.plan\.measure"):
        Machine.load(file)
    with pytest.raises(ConfigError, match="does not exist"):
        Machine.load(tmp_path / "none.json")


def test_a_card_has_a_rate_for_every_kind_and_unknown_ones_are_refused():
    for name in CARDS:
        assert set(card(name).seconds["bfloat16"]) == set(KINDS)
    with pytest.raises(ConfigError, match="one of A100, H100, H200"):
        card("B9")


def test_the_memory_of_a_card_decides_what_fits_where_none_is_given():
    assert (memory_of("H200"), memory_of(None)) == (CARDS["H200"].memory / 1e9, None)
