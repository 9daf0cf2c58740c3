"""Every ready set through the real code, from made-up rows in the set's own schema: text, columns, metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.config.compose import compose
from src.config.files import CONF
from src.data.table_corpus import TableCorpus
from src.data.tables import SPLITS
from src.errors import DataError
from src.rewards.verifiers import NumericMatch
from src.stages.objects import instantiate
from tests.data import sets
from tests.families import tokenizer_of
from tests.tiny import FOREIGN_WARNINGS

pytestmark = FOREIGN_WARNINGS
READY = ("gsm8k", "imdb", "hh_rlhf", "ultrafeedback_binarized", "tldr")
QWEN = "qwen2.5-0.5b-instruct"


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of(QWEN).save_pretrained(folder)
    return str(folder)


def corpus(folder: Path, name: str, *overrides: str) -> TableCorpus:
    """The set as `data=name` makes it, from a folder with made-up rows."""
    return made_of(f"data={name}", *sets.write_set(folder, name), *overrides)


def made_of(*overrides: str) -> TableCorpus:
    """The set as it is configured."""
    made: TableCorpus = instantiate(compose(["experiment=none", *overrides]).data, "data")
    return made


def by_prompt(rows: Any) -> dict[str, Any]:
    return {row.prompt: row for row in rows}


def test_every_file_of_the_group_that_reads_tables_is_tried_here() -> None:
    of_tables = {path.stem for path in (CONF / "data").glob("*.yaml") if "- base" in path.read_text()}
    assert of_tables == {*READY, "custom", "custom_texts"}


def test_gsm8k(tmp_path: Path) -> None:
    made = corpus(tmp_path, "gsm8k")
    rows = made.prompts("test")
    assert [row.metadata for row in rows] == sets.gsm8k(sets.N)
    instruction = 'Let\'s think step by step and output the final answer after "####".'
    assert [row.prompt for row in rows] == [f"{row['question']} {instruction}" for row in sets.gsm8k(sets.N)]
    assert made.texts("test") == [
        f"{p.prompt} {row['answer']}" for p, row in zip(rows, sets.gsm8k(sets.N), strict=True)
    ]
    # validation is cut from train: a tenth of twelve prompts, rounded
    assert [len(made.prompts(split)) for split in SPLITS] == [11, 1, 12]
    reward = NumericMatch("answer", "####", 0.0)
    answers = [f"So it is {2 * i}.\n#### {2 * i}" for i in range(sets.N, 2 * sets.N)]
    assert reward.score([], answers, [row.metadata for row in rows]) == [1.0] * sets.N
    with pytest.raises(DataError, match=r"no chosen answers here: name their column with data\.columns\.chosen"):
        made.pairs("test")


def test_gsm8k_as_a_chat(tmp_path: Path, chat_tokenizer: str) -> None:
    """Checklist 24."""
    options = ["data.chat=true", "data.system='Be brief.'", f"data.tokenizer={chat_tokenizer}"]
    made = corpus(tmp_path, "gsm8k", *options)
    row, question = made.prompts("test")[0], sets.gsm8k(sets.N)[0]
    plain = corpus(tmp_path, "gsm8k").prompts("test")[0].prompt
    asked = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{plain}<|im_end|>\n<|im_start|>assistant\n"
    assert row.prompt == asked
    assert row.metadata["prompt_messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": plain},
    ]  # fmt: skip
    assert made.texts("test")[0] == asked + question["answer"]


def test_imdb(tmp_path: Path) -> None:
    made = corpus(tmp_path, "imdb")
    texts = [f"On day {i} I saw this film. It was {('bad', 'good')[i % 2]} fun." for i in range(sets.N, 2 * sets.N)]
    assert made.texts("test") == texts
    rows = made.prompts("test")
    assert [row.prompt for row in rows] == [f"On day {i} I saw this" for i in range(sets.N, 2 * sets.N)]
    assert [row.metadata["label"] for row in rows] == [i % 2 for i in range(sets.N, 2 * sets.N)]


def test_texts_that_begin_alike_stay_in_one_split(tmp_path: Path) -> None:
    """The prompt is the first words: training on a text that begins like a held-out one would make it known."""
    rows = [{"text": f"On day {i // 3} I saw {i % 3} films.", "label": 0} for i in range(90)]
    sets.write_rows(tmp_path / "train.jsonl", rows)
    cut = made_of("data=custom_texts", f"data.path={tmp_path}/train.jsonl")
    sets.write_rows(tmp_path / "test.jsonl", [{"text": "On day 7 I saw 9 films.", "label": 1}])
    own = made_of("data=imdb", f"data.path={tmp_path}", "data.columns.words=3")
    assert own.account["train"]["dropped"] == {"in another split": 3}
    for made in (cut, own):
        prompts = [{row.prompt for row in made.prompts(split)} for split in SPLITS]
        assert sum(map(len, prompts)) == len(set().union(*prompts)) == 30


def test_hh_rlhf_keeps_the_published_form(tmp_path: Path) -> None:
    made = corpus(tmp_path, "hh_rlhf")
    source = sets.hh_rlhf(sets.N)
    assert made.texts("test") == [row["chosen"] for row in source]
    pairs = made.pairs("test")
    assert [p.prompt + p.chosen for p in pairs] == [row["chosen"] for row in source]
    assert [p.prompt + p.rejected for p in pairs] == [row["rejected"].rstrip() for row in source]
    assert all(p.prompt.endswith("\n\nAssistant:") and p.chosen == " Dig a deep hole." for p in pairs)
    assert all(p.gap is None for p in pairs)
    assert [row.metadata for row in made.prompts("test")] == [
        {**row, "prompt_messages": prompt.metadata["prompt_messages"]}
        for row, prompt in zip(source, made.prompts("test"), strict=True)
    ]


def test_hh_rlhf_through_the_chat_template_of_the_model(tmp_path: Path, chat_tokenizer: str) -> None:
    """Checklist 24."""
    made = corpus(tmp_path, "hh_rlhf", "data.chat_template=null", f"data.tokenizer={chat_tokenizer}")
    turns = ["<|im_start|>user\nHow do I plant tree 13?<|im_end|>\n", "<|im_start|>assistant\nWhere is it to stand?"]
    asked = [*turns, "<|im_end|>\n<|im_start|>user\nIn garden 13.<|im_end|>\n<|im_start|>assistant\n"]
    pair = made.pairs("test")[1]
    assert (pair.prompt, pair.chosen, pair.rejected) == ("".join(asked), "Dig a deep hole.", "I do not know.")


def test_ultrafeedback(tmp_path: Path, chat_tokenizer: str) -> None:
    made = corpus(tmp_path, "ultrafeedback_binarized", f"data.tokenizer={chat_tokenizer}")
    pairs = by_prompt(made.pairs("test"))
    assert len(pairs) == sets.N
    for row in sets.ultrafeedback_binarized(sets.N):
        pair = pairs[f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"]
        assert (pair.chosen, pair.rejected) == ("Red, blue and more.", "No.")
        assert pair.gap == row["score_chosen"] - row["score_rejected"] > 0
    assert made.texts("test")[0].endswith("<|im_start|>assistant\nRed, blue and more.")
    assert made.prompts("test")[0].metadata["prompt_id"] == f"{sets.N:064x}"


def test_tldr_and_its_comparisons(tmp_path: Path) -> None:
    made = corpus(tmp_path, "tldr")
    assert made.texts("test") == [row["prompt"] + row["completion"] for row in sets.tldr(2 * sets.N)]
    assert [row.prompt for row in made.prompts("train")] == [row["prompt"] for row in sets.tldr()]
    pairs = made.pairs("validation")
    assert len(pairs) == sets.N
    for number, pair in enumerate(pairs, start=4 * sets.N):
        assert pair.prompt == sets.tldr(number)[0]["prompt"]  # the template writes the same form
        ran, sad = f" Dog {number} ran.", " I am sad."
        assert (pair.chosen, pair.rejected) == ((ran, sad) if number % 2 == 0 else (sad, ran))
    # the comparisons have no test split: one is cut from their train
    assert [len(made.pairs(split)) for split in SPLITS] == [11, 12, 1]
    assert made.account["pairs"]["test"] == {"rows": 1, "kept": 1, "dropped": {}}


def test_comparisons_of_held_out_posts_are_not_trained_on(tmp_path: Path) -> None:
    """The texts' test split holds the posts of some training pairs."""
    overrides = sets.write_set(tmp_path, "tldr")
    sets.write_rows(tmp_path / "test.jsonl", sets.tldr(6))  # posts 6 to 17; the pairs of train are of posts 0 to 11
    made = made_of("data=tldr", *overrides)
    held_out = {row.prompt for split in ("validation", "test") for row in made.prompts(split)}
    assert held_out.isdisjoint(pair.prompt for pair in made.pairs("train"))
    assert held_out.isdisjoint(row.prompt for row in made.prompts("train"))
    assert made.account["train"]["dropped"] == {"in another split": 6}


def test_news_articles_among_the_comparisons_fall(tmp_path: Path) -> None:
    overrides = sets.write_set(tmp_path, "tldr")
    rows = sets.comparisons()
    for row in rows[:3]:
        row["info"] |= {"post": None, "article": "News.", "subreddit": None}
    sets.write_rows(tmp_path / "comparisons/train.jsonl", rows)
    made = made_of("data=tldr", *overrides)
    assert made.account["pairs"]["train"]["dropped"] == {"no info.post": 3}
