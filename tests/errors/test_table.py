"""Every row of docs/errors.md, made and met: the answer, the exit code, and what is kept."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.errors.page import PAGE, page
from tests.errors.table import GROUPS, NOTHING, REVIEWS, TINY, Case
from tests.errors.workshop import Place, run
from tests.tiny import write_reward_model

CASES = {f"{group}: {case.given}": case for group, cases in GROUPS.items() for case in cases}


@pytest.fixture(scope="session")
def shared(tiny_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Language model, reward model and finished run of all rows."""
    return Path(tiny_run[1]), Path(write_reward_model(tmp_path_factory.mktemp("errors") / "reward_model")), tiny_run[0]


@pytest.fixture
def place(shared: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, *shared)


def pattern(text: str) -> str:
    """A regular expression for a text in which `…` stands for anything."""
    return ".*".join(re.escape(part) for part in text.split("…"))


@pytest.mark.parametrize("name", CASES)
def test_every_row(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case: Case = CASES[name]
    if case.make is not None:
        case.make(place)
    module, *rest = shlex.split(case.command)
    small = [] if "data=" in case.command or case.base != TINY else REVIEWS.split()
    with case.within(place) if case.within is not None else nullcontext():
        said = run([module, *map(place.fill, [*case.base.split(), *small, *rest])], monkeypatch, capsys)
    answer = pattern(place.fill(case.answer))
    assert said.code == case.code, said.err
    if case.code:
        assert re.fullmatch(f"error: {answer}\n", said.err), said.err
    else:
        assert re.search(answer, said.out + said.err), said.out + said.err
    if case.kept == NOTHING:
        assert not place.logs.exists()
    if case.check is not None:
        case.check(place)


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.errors`"


def test_it_is_long_enough_and_names_nothing_twice() -> None:
    assert len(CASES) == sum(map(len, GROUPS.values())) >= 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Configuration: infinity", "Data files: invalid UTF-8", "Rewards: a function that raises"]
)
def test_a_process_of_its_own_says_the_same(name: str, place: Place) -> None:
    case = CASES[name]
    if case.make is not None:
        case.make(place)
    module, *rest = case.command.split()
    small = [] if "data=" in case.command else REVIEWS.split()
    command = [sys.executable, "-m", f"src.{module}", *map(place.fill, [*case.base.split(), *small, *rest])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=PAGE.parents[1])
    assert done.returncode == case.code
    assert re.fullmatch(f"error: {pattern(place.fill(case.answer))}\n", done.stderr), done.stderr
