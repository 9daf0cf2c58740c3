"""The sums: right where they should be, wrong as often as asked, and no problem in two splits."""

from __future__ import annotations

import math

import pytest

from src.data.embedded.arithmetic import Arithmetic
from src.data.tables import SPLITS
from src.data.tokenizers import character_level
from src.errors import SettingError

NOISE = 0.6


@pytest.fixture(scope="module")
def corpus() -> Arithmetic:
    return Arithmetic(largest=49, noise=NOISE, copies=4, seed=1)


def parsed(text: str) -> tuple[int, int, int]:
    problem, answer = text.split("=")
    a, b = problem.split("+")
    return int(a), int(b), int(answer)


def test_every_problem_is_in_one_split(corpus: Arithmetic) -> None:
    """80, 10 and 10 in 100 of all pairs of numbers, none twice."""
    prompts = {split: [row.prompt for row in corpus.prompts(split)] for split in SPLITS}
    together = [prompt for rows in prompts.values() for prompt in rows]
    assert sorted(together) == sorted(f"{a:02}+{b:02}=" for a in range(50) for b in range(50))
    assert [len(prompts[split]) for split in SPLITS] == [2000, 250, 250]


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_carry_the_right_answer(corpus: Arithmetic, split: str) -> None:
    for row in corpus.prompts(split):
        a, b, answer = parsed(row.prompt + row.metadata["answer"])
        assert a + b == answer


def test_every_text_is_as_long_as_every_other(corpus: Arithmetic) -> None:
    """Two digits each and two for the sum, as 49 + 49 = 98."""
    assert {len(text) for split in SPLITS for text in corpus.texts(split)} == {len("49+49=98")}


def test_training_answers_are_wrong_as_often_as_asked(corpus: Arithmetic) -> None:
    """Within four standard errors of a binomial; wrong ones spread over all other sums, each copy by itself."""
    rows = [parsed(text) for text in corpus.texts("train")]
    wrong = [row for row in rows if row[0] + row[1] != row[2]]
    assert len(rows) == 4 * 2000
    assert abs(len(wrong) / len(rows) - NOISE) < 4 * math.sqrt(NOISE * (1 - NOISE) / len(rows))
    assert {answer for _, _, answer in wrong} == set(range(99))
    assert len({row[:2] for row in rows}) == 2000
    assert len(set(rows)) > 4000


def test_held_out_texts_are_right(corpus: Arithmetic) -> None:
    for split in ("validation", "test"):
        assert all(a + b == answer for a, b, answer in map(parsed, corpus.texts(split)))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_no_noise_and_nothing_but_noise(noise: float) -> None:
    """A wrong answer is never the right one by accident."""
    rows = [parsed(text) for text in Arithmetic(largest=9, noise=noise, copies=20, seed=2).texts("train")]
    assert all((a + b != answer) == bool(noise) for a, b, answer in rows)


def test_pairs_prefer_the_right_answer(corpus: Arithmetic) -> None:
    for pair in corpus.pairs("train"):
        a, b, answer = parsed(pair.prompt + pair.chosen)
        assert a + b == answer != int(pair.rejected)


def test_a_seed_fixes_everything(corpus: Arithmetic) -> None:
    again, other = (Arithmetic(largest=49, noise=NOISE, copies=4, seed=seed) for seed in (1, 2))
    assert again.texts("train") == corpus.texts("train")
    assert other.texts("train") != corpus.texts("train")
    assert other.prompts("test") != corpus.prompts("test")


def test_characters_are_tokens(corpus: Arithmetic) -> None:
    """One token per character, and back without loss; a character that never occurred is unknown."""
    tokenizer = character_level(corpus.texts("train"))
    assert len(tokenizer) == 3 + len("0123456789+=")
    assert tokenizer.decode(tokenizer("12+7=19")["input_ids"]) == "12+7=19"
    assert len(tokenizer("12+7=19")["input_ids"]) == 7
    assert tokenizer("x")["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize(("name", "value"), [("largest", 8), ("noise", 1.1), ("noise", -0.1), ("copies", 0)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=name):
        Arithmetic(**({"largest": 9, "noise": 0.5, "copies": 1, "seed": 1} | {name: value}))
