"""docs/results.md holds the tables that were measured, and says which are older than the code that makes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from benchmarks import provenance
from benchmarks.provenance import ROOT, essence, rooms
from benchmarks.repeats import repeated
from benchmarks.seeds import newest_result
from benchmarks.studies import BLOCK, INDEX, PAGE, RESULTS, STUDIES, changed, page, read_index, state

CODE = '''"""A module."""

RATE = 0.5  # of learning


def half(x):
    """Half of x."""
    y = x * RATE
    return y
'''


@pytest.mark.slow
def test_the_page_is_what_its_command_writes():
    """Where this fails: python -m benchmarks.studies --page. The tables then say that their code has changed."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
    assert {match[1] for match in BLOCK.finditer(text)} > {"studies"}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_that_was_run_has_its_files_and_its_command_on_the_page(study):
    index = read_index()
    if study.name not in index:
        assert changed(study, index)
        return
    assert [name for name in study.files if not (RESULTS / name).is_file()] == []
    assert f"python -m {study.command[0]}" in PAGE.read_text(encoding="utf-8")
    assert set(index) <= {study.name for study in STUDIES}, INDEX


@pytest.mark.parametrize(
    "same",
    [
        CODE.replace("  # of learning", ""),
        CODE.replace("Half of x.", "x / 2."),
        CODE.replace('"""A module."""', '"""Another text\n\nof more lines."""'),
        CODE.replace("\n\n\n", "\n"),
        CODE.replace("x * RATE", "x   *   RATE"),
    ],
)
def test_words_and_layout_make_no_numbers(same):
    assert same != CODE
    assert essence(same) == essence(CODE)


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("0.5", "0.25"),
        CODE.replace("x * RATE", "x / RATE"),
        CODE.replace("    y = x * RATE\n    return y", "    y = x * RATE\n    if x:\n        y = 1\n    return y"),
        CODE.replace("return y", "return 'y'"),
    ],
)
def test_what_makes_numbers_is_noticed(other):
    assert essence(other) != essence(CODE)


def test_indentation_makes_numbers():
    """The same tokens, but the second statement is or is not part of the condition."""
    assert essence("if x:\n    a()\n    b()\n") != essence("if x:\n    a()\nb()\n")


def test_the_room_that_changed_is_named(tmp_path):
    for name in ("src", "conf", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    script = "benchmarks/seeds.py"
    before = rooms(script, root=tmp_path)
    assert before == rooms(script)
    for file, old, new in (
        (tmp_path / "src/core/kl.py", "0.5 * (", "0.25 * ("),
        (tmp_path / "src/report/page.py", "def ", "async def "),
        (tmp_path / "conf/stages/ppo.yaml", "lr: 1.0e-4", "lr: 2.0e-4"),
    ):
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
    after = rooms(script, root=tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"core", "conf"}


def test_tables_that_a_study_has_written_leave_the_commit_clean_and_code_does_not(tmp_path, monkeypatch):
    for name in ("src/a.py", "benchmarks/results/a.md", "docs/results.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"
    given = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *given, *command], check=True)
    clean = provenance.commit()
    assert len(clean) == 12
    for name in ("benchmarks/results/a.md", "docs/results.md"):
        (tmp_path / name).write_text("2\n")
    assert provenance.commit() == clean
    (tmp_path / "src/a.py").write_text("2\n")
    assert provenance.commit() == f"{clean}-dirty"


def test_the_newest_result_of_a_seed_is_not_that_of_another(tmp_path):
    """Seed 10 begins as seed 1 does; a repeated run has a folder of that name with a number; one may not have ended."""
    for age, name in enumerate(["lag-1", "lag-1_run-2", "lag-10", "lag-1_run-3"]):
        (tmp_path / name).mkdir()
        if name != "lag-1_run-3":
            file = tmp_path / name / "result.json"
            file.write_text("{}")
            os.utime(file, (age, age))
    assert newest_result(tmp_path, "lag-1") == tmp_path / "lag-1_run-2" / "result.json"
    assert newest_result(tmp_path, "lag-10") == tmp_path / "lag-10" / "result.json"


RECORDED = {"1": {"ppo": {"gold": 0.5, "n": 4}, "seconds": 9.0}, "2": {"ppo": {"gold": 0.75, "n": 4}}}


@pytest.mark.parametrize(
    ("again", "unequal"),
    [
        ({"1": {"ppo": {"gold": 0.5, "n": 4, "later": 1.0}, "seconds": 3.0}}, []),
        ({"1": {"ppo": {"gold": 0.5 + 1e-6, "n": 4}}}, ["1/ppo/gold: 0.500001, recorded 0.5"]),
        ({"1": {"ppo": {"gold": [0.5], "n": 5}}}, ["1/ppo/n: 5, recorded 4"]),
    ],
)
def test_a_repetition_is_compared_figure_by_figure_and_leaves_the_files_as_they_are(again, unequal, tmp_path):
    table, picture = tmp_path / "a.json", tmp_path / "a.png"
    table.write_text(json.dumps(RECORDED))
    picture.write_bytes(b"five seeds")

    def run():
        table.write_text(json.dumps(again))
        picture.write_bytes(b"one seed")

    assert repeated(run, table, [picture]) == unequal
    assert (json.loads(table.read_text()), picture.read_bytes()) == (RECORDED, b"five seeds")


def test_a_repetition_without_a_common_figure_is_no_agreement(tmp_path):
    table = tmp_path / "a.json"
    table.write_text(json.dumps(RECORDED))
    with pytest.raises(ValueError, match="no figure of the repetition"):
        repeated(lambda: table.write_text(json.dumps({"3": {"ppo": {"gold": 0.5}}})), table, [])
    assert json.loads(table.read_text()) == RECORDED


def test_the_first_seed_alone_is_asked_for():
    once = {study.name: " ".join(study.once) for study in STUDIES}
    assert once["sentiment_top"].endswith("--seeds 1 -- model.lora.layers=2")
    assert once["real"] == "benchmarks.real --seeds 1"
    assert once["estimators"] == "studies.estimators name=results"


def test_a_repetition_on_the_code_of_today_is_as_good_as_the_table():
    study = next(study for study in STUDIES if study.name == "sentiment")
    old, now = {"rooms": {"core": "another"}, "commit": "a"}, rooms(study.script)
    assert state(study, {"sentiment": old}) == "changed"
    assert state(study, {"sentiment": old | {"repeated": {"rooms": now, "commit": "b"}}}).endswith("at b: equal")
    assert state(study, {"sentiment": {"rooms": now}}) == "the same"
