"""Names and texts in the code use the field's words: none that `tests/words.txt` has a better one for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "studies", "examples", "benchmarks")
# "LLM as a judge" is a term
JUDGES = ("src/rewards/judge.py", "src/rewards/question.py", "src/rewards/chat_model.py", "src/stages/checks.py")
WRITES_REVIEWS = ("src/data/embedded/grammar.py",)  # its texts are the words of the reviews


def read_words(text: str) -> dict[str, str]:
    """A word, or several, in lower case -> what to write instead."""
    lines = [line.split(" -> ") for line in text.splitlines() if line and not line.startswith("#")]
    return {old.lower(): better for old, better in lines}


WORDS = read_words((ROOT / "tests" / "words.txt").read_text(encoding="utf-8"))


def parts_of(name: str) -> str:
    """The words of a name between single underscores: `ScoredRows` and `_scored_rows` are `_scored_rows_`."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return f"_{'_'.join(words).lower()}_"


def worse_in_name(name: str) -> str | None:
    """The first word of the list in a name."""
    return next((old for old in WORDS if f"_{old.replace(' ', '_')}_" in parts_of(name)), None)


def worse_in_text(text: str) -> str | None:
    """The first word of the list in a text; a key such as `ppo.old_kl_limit` is one word."""
    plain = " ".join(re.findall(r"[\w'-]+", text.lower()))
    return next((old for old in WORDS if "_" not in old and f" {old} " in f" {plain} "), None)


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a file defines: functions, classes, arguments, variables, attributes, aliases."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and content of every string with a space that is no docstring: messages, help, pieces of f-strings."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            if id(node) not in statements:
                yield node.lineno, node.value


def problems(path: str, source: str) -> list[str]:
    """`file:line: word -> better word, in ...` for everything in a file that has a better word, in its order."""
    tree = ast.parse(source)
    found = [(1, part, worse_in_name(part)) for part in Path(path).with_suffix("").parts]
    found += [(line, name, worse_in_name(name)) for line, name in names(tree)]
    if path not in WRITES_REVIEWS:
        found += [(line, " ".join(text.split()), worse_in_text(text)) for line, text in texts(tree)]
    known = "judge" if path in JUDGES else None
    wrong = sorted({(line, old, where) for line, where, old in found if old not in (None, known)})
    return [f"{path}:{line}: {old} -> {WORDS[old]}, in {where!r}" for line, old, where in wrong]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_code_uses_the_fields_words(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [p for file in files for p in problems(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8"))]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    "source",
    [
        "def judge(): ...",
        "class RowJudge: ...",
        "def f(said): ...",
        "_verdict = 1",
        "self.put_aside = 1",
        "import io as anew",
        "raise ValueError('the run begins anew')",
        "raise ValueError(f'{x} starts\\n anew')",
        "refuse(key, value, 'it goes on')",
    ],
)
def test_a_word_with_a_better_one_is_found_with_its_line(source):
    assert [p.split(" -> ")[0].rpartition(":")[0] for p in problems("src/a.py", f"\n{source}")] == ["src/a.py:2"]


def test_the_name_of_a_file_and_of_its_folder_count():
    assert len(problems("src/ladder/judge.py", "")) == 2


@pytest.mark.parametrize(
    "source",
    [
        "def scorer(): ...",
        "adjudged = 1",
        "'''The run begins anew.'''",
        "key = 'anew'",
        "raise ValueError('there is no key ppo.old_kl_limit')",
        "raise ValueError('0.1 nats per token')",
    ],
)
def test_other_words_and_docstrings_are_left_alone(source):
    assert problems("src/a.py", source) == []


def test_every_line_of_the_list_has_a_word_and_another_one():
    for old, better in WORDS.items():
        assert old.strip() and better.strip()  # noqa: PT018
        assert old not in better.split(", ")
