"""Rated sentences: filters, splits, pairs, and errors that say what fell where."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from src.data.rated_sentences import RatedSentences
from src.errors import DataError

SPLITS = ("train", "validation", "test")


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rated(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of six words with whole ratings from -3 to 3."""
    rng = Random(seed)
    return [
        {"id": row, "text": f"sentence {row} is this one here", "rating": rng.randint(-3, 3)} for row in range(number)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> RatedSentences:
    return RatedSentences(write(tmp_path_factory.mktemp("rated"), rated(500)), n_pairs=2_000)


def test_splits_are_disjoint_and_complete(corpus: RatedSentences) -> None:
    assert [len(corpus.texts(split)) for split in SPLITS] == [400, 50, 50]
    assert {text for split in SPLITS for text in corpus.texts(split)} == {row["text"] for row in rated(500)}


def test_sentences_with_one_prompt_stay_in_one_split(tmp_path: Path) -> None:
    """Three sentences of each prompt: before, 27 of 30 prompts stood in two splits."""
    rows = [{"text": f"the film number {i % 30} was good {i}", "rating": i % 5} for i in range(90)]
    corpus = RatedSentences(write(tmp_path, rows))
    prompts = {split: {row.prompt for row in corpus.prompts(split)} for split in SPLITS}
    assert [len(prompts[split]) for split in SPLITS] == [24, 3, 3]
    assert len(set().union(*prompts.values())) == 30


def test_one_prompt_for_all_cannot_be_split(tmp_path: Path) -> None:
    rows = [{"text": f"all start the same {i}", "rating": i} for i in range(40)]
    path = write(tmp_path, rows)
    message = (
        f"{path} leaves the validation and test splits empty: "
        "of 40 rows 40 are left after dropping 0 repeated, 0 too long, 0 too short, with 1 prompts"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        RatedSentences(path)


def test_seed_fixes_splits_and_pairs(corpus: RatedSentences) -> None:
    again = RatedSentences(corpus.path, n_pairs=2_000)
    other = RatedSentences(corpus.path, n_pairs=2_000, seed=2)
    assert all(again.texts(split) == corpus.texts(split) for split in SPLITS)
    assert again.pairs("train") == corpus.pairs("train")
    assert set(other.texts("test")) != set(corpus.texts("test"))


def test_prompts_carry_the_other_columns(corpus: RatedSentences) -> None:
    rows = {row["text"]: row for row in rated(500)}
    for text, prompt in zip(corpus.texts("test"), corpus.prompts("test"), strict=True):
        assert prompt.prompt == " ".join(text.split()[:4])
        assert text.startswith(prompt.prompt + " ")
        assert prompt.metadata == {"id": rows[text]["id"], "rating": rows[text]["rating"]}


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_of_the_split_with_the_higher_rated_chosen(corpus: RatedSentences, split: str) -> None:
    ratings = {row["text"]: row["rating"] for row in rated(500)}
    pairs, texts = corpus.pairs(split), set(corpus.texts(split))
    assert len(pairs) == {"train": 2_000, "validation": 250, "test": 250}[split]
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.prompt == ""
        assert {pair.chosen, pair.rejected} <= texts
        assert pair.gap == ratings[pair.chosen] - ratings[pair.rejected] >= 1.0
    assert {pair.gap for pair in pairs} >= {1.0, 6.0}


def test_min_gap_is_kept_to_the_exact_value(corpus: RatedSentences) -> None:
    gaps = {pair.gap for pair in RatedSentences(corpus.path, n_pairs=2_000, min_gap=4.0).pairs("train")}
    assert gaps == {4.0, 5.0, 6.0}


def test_sentences_are_used_about_equally_often(corpus: RatedSentences) -> None:
    uses = Counter(text for pair in corpus.pairs("train") for text in (pair.chosen, pair.rejected))
    # 2,000 pairs of 400 sentences: 10 uses each on average.
    assert set(uses) == set(corpus.texts("train"))
    assert min(uses.values()) >= 5
    assert max(uses.values()) <= 15


def test_no_more_pairs_than_there_are(tmp_path: Path) -> None:
    rows = rated(20)
    for place, row in enumerate(rows):
        row["rating"] = place % 2
    corpus = RatedSentences(write(tmp_path, rows), n_pairs=1_000)
    ratings = Counter(row.metadata["rating"] for row in corpus.prompts("train"))
    assert len(corpus.pairs("train")) <= ratings[0] * ratings[1]
    assert len(corpus.pairs("train")) > ratings[0] * ratings[1] * 0.5


def test_each_filter_counts_what_it_drops(tmp_path: Path) -> None:
    rows = rated(10)
    rows += [
        {"text": rows[0]["text"], "rating": 3.0},
        {"text": "  " + rows[1]["text"].replace(" ", "   "), "rating": 3.0},  # the same but for white space
        {"text": " ".join(["word"] * 41), "rating": 0.0},
        {"text": " ".join(["word"] * 40), "rating": 0.0},
        {"text": "four words fall here", "rating": 0.0},
        {"text": "five words are just enough", "rating": 0.0},
        {"text": "", "rating": 0.0},
        {"text": "", "rating": 0.0},
    ]
    corpus = RatedSentences(write(tmp_path, rows))
    assert corpus.dropped == {"repeated": 3, "too long": 1, "too short": 2}
    kept = {text for split in SPLITS for text in corpus.texts(split)}
    assert kept == {row["text"] for row in rows[:10]} | {rows[13]["text"], rows[15]["text"]}


def test_white_space_is_normalized(tmp_path: Path) -> None:
    rows = [{"text": f" a{row}  b\tc d\ne ", "rating": row} for row in range(10)]
    corpus = RatedSentences(write(tmp_path, rows))
    assert {text for split in SPLITS for text in corpus.texts(split)} == {f"a{row} b c d e" for row in range(10)}


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    rows = [{"review": row["text"], "stars": row["rating"]} for row in rated(30)]
    corpus = RatedSentences(write(tmp_path, rows), text_column="review", rating_column="stars")
    assert all(set(row.metadata) == {"stars"} for row in corpus.prompts("train"))


@pytest.mark.parametrize("rating", ["2.5", None, True, float("nan"), float("inf"), [1]])
def test_a_rating_that_is_no_number_is_an_error_with_its_place(tmp_path: Path, rating: object) -> None:
    rows = rated(12)
    rows[6]["rating"] = rating
    path = write(tmp_path, rows)
    message = f"{path}:7, column 'rating' must be a finite number, but is {rating!r}"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        RatedSentences(path)


def test_a_text_that_is_no_text_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": 5, "rating": 1.0}])
    with pytest.raises(DataError, match=f"^{re.escape(path)}:1, column 'text' must be a text, but is 5$"):
        RatedSentences(path)


def test_empty_splits_say_what_fell(tmp_path: Path) -> None:
    rows = [*rated(9), rated(1)[0], {"text": "short", "rating": 0}]
    path = write(tmp_path, rows)
    message = (
        f"{path} leaves the validation and test splits empty: "
        "of 11 rows 9 are left after dropping 1 repeated, 0 too long, 1 too short, with 9 prompts"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        RatedSentences(path)


def test_no_pair_says_what_fell(tmp_path: Path) -> None:
    path = write(tmp_path, [{**row, "rating": 1} for row in rated(20)])
    message = (
        f"{path} has no two ratings min_gap=1.0 apart in 'test': "
        "of 20 rows 20 are left after dropping 0 repeated, 0 too long, 0 too short"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        RatedSentences(path).pairs("test")


def test_quality_knows_nothing(corpus: RatedSentences) -> None:
    assert corpus.quality(["any text"]) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_gap": 0.0}, "min_gap must be above 0, but is 0.0"),
        ({"n_pairs": 0}, "n_pairs must be at least 1, but is 0"),
        ({"prompt_words": 0}, "prompt_words must be at least 1, but is 0"),
        ({"max_words": 4}, "max_words must be above prompt_words (4), but is 4"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RatedSentences(str(tmp_path / "unread.jsonl"), **arguments)
