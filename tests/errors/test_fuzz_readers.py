"""Whatever lies in a data file: rows, or the project's own error, on one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.data.rated_sentences import RatedSentences
from src.data.row_formats import Columns, Comparisons, Dialogues, PrefixPrompt, RowFormat
from src.data.table_corpus import TableCorpus
from src.errors import DataError
from src.evaluate.prompt_file import given_responses, read_prompts

FORMATS: list[RowFormat] = [
    Columns("q", "a"),
    Columns("q.x", "a.y"),
    Columns(chosen="a", rejected="b"),
    Columns("q", chosen="a", rejected="b", chosen_score="s", rejected_score="t"),
    PrefixPrompt("q", 2),
    Dialogues("a", "b"),
    Comparisons("a", "x", "s", "q"),
]
SPLITS = {"train": "train", "validation": None, "test": None}
FEW = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["a b c d e f", "\n\nHuman: a\n\nAssistant: b", "🎬", "\u202eשלום", "\x00\u2028", "\ud83c"]),
)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
messages = st.lists(
    st.fixed_dictionaries({"role": st.one_of(st.just("assistant"), plain), "content": plain}), max_size=3
)
cells = st.recursive(
    plain | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y", "role"]), inner, max_size=3),
    max_leaves=6,
)
tables = st.lists(
    st.dictionaries(st.sampled_from(["q", "a", "b", "s", "t", "responses", "prompt"]), cells), max_size=14
)


@st.composite
def files(draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """(ending, content): a table in its format, one with a byte changed, or bytes that are nothing."""
    ending = draw(st.sampled_from([".jsonl", ".json", ".txt"]))
    kind = draw(st.sampled_from(["rows", "rows", "broken", "bytes"]))
    if kind == "bytes":
        return ending, draw(st.binary(max_size=60) | st.text('{}[]",:\\u0 \n\r\xff1eE.-naN', max_size=40).map(as_bytes))
    rows = draw(tables)
    whole = ending == ".json" and draw(st.booleans())
    content = as_bytes(json.dumps(rows) if whole else "\n".join(map(json.dumps, rows)))
    if kind == "broken" and content:
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    return ending, content


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def read(path: str, form: RowFormat, chat: bool) -> list[Callable[[], Any]]:
    """Every way in which this project reads such a file."""
    template = "templates/chatml.jinja"

    def table(part: str) -> Any:
        return getattr(TableCorpus(path, form, SPLITS, chat=chat, chat_template=template), part)("train")

    tabular = [lambda part=part: table(part) for part in ("prompts", "texts", "pairs")]
    rated = [lambda: RatedSentences(path, "q", "s", prompt_words=1).pairs("train")]
    asked = [lambda: given_responses(read_prompts(path))]
    return asked if path.endswith(".txt") else [*asked, *rated, *tabular]


def answers_with_rows_or_a_sentence(file: tuple[str, bytes], form: RowFormat, chat: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{file[0]}"
        path.write_bytes(file[1])
        for reader in read(str(path), form, chat):
            sentence = refusal(reader)
            assert sentence is None or str(path) in sentence or "data." in sentence
            assert sentence is None or "\n" not in sentence


def refusal(call: Callable[[], Any]) -> str | None:
    """What it is refused with, if it is."""
    try:
        call()
    except DataError as error:
        return str(error)
    return None


@settings(max_examples=300, **FEW)  # type: ignore[arg-type]
@given(files(), st.sampled_from(FORMATS), st.booleans())
def test_a_data_file_gives_rows_or_a_sentence(file: tuple[str, bytes], form: RowFormat, chat: bool) -> None:
    answers_with_rows_or_a_sentence(file, form, chat)


@pytest.mark.slow
@settings(max_examples=2000, **FEW)  # type: ignore[arg-type]
@given(files(), st.sampled_from(FORMATS), st.booleans())
def test_many_data_files_give_rows_or_a_sentence(file: tuple[str, bytes], form: RowFormat, chat: bool) -> None:
    answers_with_rows_or_a_sentence(file, form, chat)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@settings(max_examples=12, **FEW)  # type: ignore[arg-type]
@given(content=st.binary(max_size=40) | st.text('qa,"\n1.é', max_size=30).map(lambda t: f"q,a\n{t}".encode()))
def test_what_the_library_reads_gives_rows_or_a_sentence(ending: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", f"{folder}/cache")
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(content)
        sentence = refusal(lambda: TableCorpus(str(path), Columns("q", "a"), SPLITS).texts("train"))
        assert sentence is None or str(path) in sentence
