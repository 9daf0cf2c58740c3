"""Filters with counts, splits that share nothing, templates and chats, and bad rows that say where they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from src.data.row_formats import Columns, Comparisons, Dialogues, PrefixPrompt, RowFormat
from src.data.table_corpus import TableCorpus
from src.data.tables import SPLITS
from src.errors import DataError, SettingError
from tests.data.sets import chat, write_rows
from tests.families import tokenizer_of
from tests.tiny import FOREIGN_WARNINGS

pytestmark = FOREIGN_WARNINGS
ONE_FILE = {"train": "train", "validation": None, "test": None}
PLAIN = Columns(prompt="q", response="a")
PAIRS = Columns(prompt="q", chosen="good", rejected="bad")
HUMAN, REPLY = "\n\nHuman:", "\n\nAssistant:"
LLAMA = "llama-3.2-1b-instruct"


def rows(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"q": f"question {i}", "a": f"answer {i}", "id": i} for i in range(start, start + number)]


def pair_rows(number: int) -> list[dict[str, Any]]:
    return [{"q": f"question {i}", "good": "yes", "bad": "no"} for i in range(number)]


def made(tmp_path: Path, content: list[dict[str, Any]], form: RowFormat = PLAIN, **options: Any) -> TableCorpus:
    return TableCorpus(str(write_rows(tmp_path / "rows.jsonl", content)), form, ONE_FILE, **options)


def refusal(tmp_path: Path, content: list[dict[str, Any]], form: RowFormat = PLAIN, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        made(tmp_path, content, form, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------------ splits


def test_missing_splits_are_cut_by_the_seed_and_share_no_prompt(tmp_path: Path) -> None:
    content = [row for row in rows(100) for _ in range(2)]  # each prompt twice, with two answers
    for number, row in enumerate(content):
        content[number] = {**row, "a": f"answer {number}"}
    corpus = made(tmp_path, content)
    prompts = {split: {row.prompt for row in corpus.prompts(split)} for split in SPLITS}
    assert [len(corpus.prompts(split)) for split in SPLITS] == [160, 20, 20]
    assert set.union(*prompts.values()) == {f"question {i}" for i in range(100)}
    assert sum(map(len, prompts.values())) == 100
    again, other = made(tmp_path, content), made(tmp_path, content, seed=2)
    assert again.prompts("test") == corpus.prompts("test")
    assert {row.prompt for row in other.prompts("test")} != prompts["test"]


def test_a_cut_split_hardly_changes_with_further_rows(tmp_path: Path) -> None:
    """The place of a prompt depends on the seed and the prompt alone, so one row in ten moves an edge by one."""
    before = {row.prompt for row in made(tmp_path, rows(200)).prompts("test")}
    after = {row.prompt for row in made(tmp_path, rows(210)).prompts("test")}
    assert len(before & after) >= 19  # of 20: of the ten new prompts some take places of old ones


def test_a_row_of_two_splits_stays_in_the_held_out_one(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [*rows(20), *rows(3)])
    write_rows(tmp_path / "valid.jsonl", rows(10, start=15))
    write_rows(tmp_path / "test.jsonl", rows(10, start=22))
    corpus = TableCorpus(str(train.parent), PLAIN, {"train": "train", "validation": "valid", "test": "test"})
    assert [row.metadata["id"] for row in corpus.prompts("test")] == list(range(22, 32))
    assert [row.metadata["id"] for row in corpus.prompts("validation")] == list(range(15, 22))
    assert [row.metadata["id"] for row in corpus.prompts("train")] == list(range(15))
    assert corpus.account["train"] == {"rows": 23, "kept": 15, "dropped": {"in another split": 5, "repeated": 3}}
    assert corpus.account["validation"] == {"rows": 10, "kept": 7, "dropped": {"in another split": 3}}


def test_a_held_out_file_beside_the_train_file(tmp_path: Path) -> None:
    train, test = write_rows(tmp_path / "a.jsonl", rows(20)), write_rows(tmp_path / "b.jsonl", rows(5, start=50))
    corpus = TableCorpus(str(train), PLAIN, {"train": "train", "validation": None, "test": str(test)})
    assert [len(corpus.prompts(split)) for split in SPLITS] == [18, 2, 5]


# ----------------------------------------------------------------------------------------------------- filters


def test_every_filter_counts_what_it_takes(tmp_path: Path) -> None:
    tokenizer_of("gpt2").save_pretrained(tmp_path)
    content = [
        *pair_rows(30),
        {"q": "  ", "good": "yes", "bad": "no"},
        {"q": None, "good": "yes", "bad": "no"},
        {"q": "side?", "good": "yes", "bad": ""},
        {"q": "same?", "good": "yes", "bad": "yes"},
        {"q": "same?", "good": "yes", "bad": " yes"},
        {"q": "z" * 60, "good": "yes", "bad": "no"},
        {"q": "long?", "good": "z" * 60, "bad": "no"},
        {"q": "question 3", "good": "yes", "bad": "no"},
    ]
    limits = {"max_prompt_tokens": 50, "max_response_tokens": 50, "tokenizer": str(tmp_path)}
    corpus = made(tmp_path, content, PAIRS, **limits)
    dropped: dict[str, int] = {}
    for split in SPLITS:
        account = corpus.account[split]
        assert account["rows"] == account["kept"] + sum(account["dropped"].values())
        assert account["kept"] == len(corpus.pairs(split))
        for reason, count in account["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    assert dropped == {
        "no prompt": 2,
        "an empty answer": 1,
        "identical sides": 2,
        "prompt longer than 50 tokens": 1,
        "answer longer than 50 tokens": 1,
        "repeated": 1,
    }
    assert sum(corpus.account[split]["rows"] for split in SPLITS) == len(content)
    assert f"(first: {tmp_path / 'rows.jsonl'}:33)" in corpus.report()  # the empty side


def test_the_limit_counts_the_tokens_of_the_models_tokenizer_and_the_end_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("gpt2")
    tokenizer.save_pretrained(tmp_path)
    content = [{"q": "question " + "?" * i, "a": "answer"} for i in range(1, 31)]
    lengths = sorted(len(tokenizer(row["q"])["input_ids"]) for row in content)
    corpus = made(tmp_path, content, max_prompt_tokens=lengths[14], tokenizer=str(tmp_path))
    assert sum(corpus.account[split]["kept"] for split in SPLITS) == sum(n <= lengths[14] for n in lengths)
    answer = len(tokenizer(" answer")["input_ids"])
    made(tmp_path, content, max_response_tokens=answer + 1, tokenizer=str(tmp_path))
    message = refusal(tmp_path, content, max_response_tokens=answer, tokenizer=str(tmp_path))
    assert "leaves the" in message
    assert f"answer longer than {answer} tokens" in message


def test_an_empty_set_says_what_fell_at_which_filter(tmp_path: Path) -> None:
    content = [{"q": f"question {i}", "good": "same", "bad": "same"} for i in range(20)]
    file = tmp_path / "rows.jsonl"
    message = refusal(tmp_path, content, PAIRS)
    assert re.fullmatch(
        rf"{re.escape(str(file))} leaves the train split empty: 0 of 20 rows; dropped: 20 identical sides "
        rf"\(first: {re.escape(str(file))}:\d+\)",
        message,
    )


def test_too_few_prompts_to_hold_some_out_are_refused(tmp_path: Path) -> None:
    """With three there is one for each split; repeated rows are one prompt, and a split that has a file needs none."""
    file = tmp_path / "rows.jsonl"
    ends = "one for each of validation and test, which leaves none to train on; give more rows, or files in "
    ends += "data.splits.validation and data.splits.test"
    for content, number in ((rows(1), 1), (rows(2), 2), (rows(1) * 4, 1)):
        start = f"{file} has too few prompts ({number}): data.held_out=0.1 holds out at least "
        assert refusal(tmp_path, content) == start + ends
    assert {split: len(made(tmp_path, rows(3)).prompts(split)) for split in SPLITS} == dict.fromkeys(SPLITS, 1)


def test_splits_are_cut_from_what_the_filters_leave(tmp_path: Path) -> None:
    """Were they cut first, none of these would be left of the test split."""
    held_out = {row.prompt for row in made(tmp_path, pair_rows(40), PAIRS).prompts("test")}
    assert len(held_out) == 4
    content = [{**row, "bad": "yes"} if row["q"] in held_out else row for row in pair_rows(40)]
    corpus = made(tmp_path, content, PAIRS)
    assert [len(corpus.prompts(split)) for split in SPLITS] == [28, 4, 4]
    assert corpus.account["train"] == {"rows": 32, "kept": 28, "dropped": {"identical sides": 4}}


def test_identical_prompts_are_too_few_whatever_else_is_dropped(tmp_path: Path) -> None:
    same = [{"q": "a?", "a": f"answer {i // 2}"} for i in range(40)]
    for content in (same, [*same, {"q": "b?", "a": ""}]):
        message = refusal(tmp_path, content)
        assert message.startswith(f"{tmp_path / 'rows.jsonl'} has too few prompts (1): ")


def test_what_is_missing_is_dropped_and_what_is_no_number_is_refused(tmp_path: Path) -> None:
    corpus = made(tmp_path, [*rows(20), {"q": float("nan"), "a": "x"}, {"q": "c?", "a": float("nan")}])
    assert corpus.account["train"]["dropped"] == {"no prompt": 1, "an empty answer": 1}
    assert "column 'q' must be a text or a list of messages, but is inf" in refusal(
        tmp_path, [{"q": float("inf"), "a": ""}]
    )
    scored = Columns("q", chosen="good", rejected="bad", chosen_score="s", rejected_score="t")
    row = {"q": "a", "good": "b", "bad": "c", "s": float("nan"), "t": 1}
    assert "column 's' must be a number, but is nan" in refusal(tmp_path, [row], scored)


def test_scores_of_a_table_of_text_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("q,good,bad,s,t\n" + "".join(f"question {i},yes,no,2.50,0{i % 4}\n" for i in range(20)))
    scored = Columns("q", chosen="good", rejected="bad", chosen_score="s", rejected_score="t")
    corpus = TableCorpus(str(file), scored, ONE_FILE)
    pairs = [pair for split in SPLITS for pair in corpus.pairs(split)]
    assert {pair.prompt: pair.gap for pair in pairs} == {f"question {i}": 2.5 - i % 4 for i in range(20) if i % 4 < 3}


def test_a_limit_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, rows(20), max_response_tokens=5)
    assert message == "data.max_response_tokens=5: a model made from scratch has no tokenizer yet to count with: " + (
        "data.max_response_tokens=null"
    )


@pytest.mark.parametrize("options", [{"held_out": 0.5}, {"held_out": 0.0}, {"max_prompt_tokens": 0}])
def test_ranges_are_checked(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(options))):
        made(tmp_path, rows(20), **options)


# ----------------------------------------------------------------------------------------------- prompts as text


def test_answers_follow_the_prompt_after_one_space(tmp_path: Path) -> None:
    content = [
        {"q": "a?", "a": "yes"},
        {"q": "b?", "a": " yes"},
        {"q": "c?\n", "a": "yes"},
        *rows(20),
    ]
    corpus = made(tmp_path, content)
    texts = {text for split in SPLITS for text in corpus.texts(split)}
    assert {"a? yes", "b? yes", "c?\nyes", "question 3 answer 3"} <= texts


def test_a_template_file_writes_the_prompt_of_the_columns(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% if id % 2 %}Odd{% else %}Even{% endif %}: {{ q | upper }}\nA:\n")
    corpus = made(tmp_path, rows(20), Columns(response="a"), template=str(template))
    for row in corpus.prompts("train"):
        number = row.metadata["id"]
        assert row.prompt == f"{'Odd' if number % 2 else 'Even'}: QUESTION {number}\nA:"


def test_a_template_that_names_no_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ question }}")
    message = refusal(tmp_path, rows(20), template=str(template))
    assert message == (
        f"{tmp_path / 'rows.jsonl'}:1: data.template cannot be filled: 'question' is undefined; "
        "the columns are ['a', 'id', 'q']"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ q.__class__.__mro__ }}", "data.template cannot be filled: access to attribute '__class__'"),
        ("{% if %}", "mine.jinja: Expected an expression"),
    ],
)
def test_a_template_is_sandboxed_and_checked(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.jinja").write_text(text)
    assert words in refusal(tmp_path, rows(20), template=str(tmp_path / "mine.jinja"))


def test_a_template_writes_nothing_for_what_is_missing(tmp_path: Path) -> None:
    """Null and NaN are no words, in a file as some editors save it: with a mark in front and Windows line ends."""
    (tmp_path / "mine.jinja").write_bytes(b"\xef\xbb\xbf{{ q }}\r\n{{ more }}|{{ id }}:\r\n")
    content = [row | {"more": (None, float("nan"), "so")[row["id"] % 3]} for row in rows(20)]
    for row in made(tmp_path, content, Columns(response="a"), template=str(tmp_path / "mine.jinja")).prompts("train"):
        number = row.metadata["id"]
        assert row.prompt == f"question {number}\n{'so' if number % 3 == 2 else ''}|{number}:"


def test_a_template_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes("é {{ q }}".encode("latin-1"))
    for key, options in (("template", {}), ("chat_template", {"chat": True})):
        file = str(tmp_path / "mine.jinja")
        message = refusal(tmp_path, rows(20), **{key: file}, **options)
        assert message == f"data.{key}={file}: it is not valid UTF-8; save it as UTF-8"


def test_a_template_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, rows(20), template="no.jinja") == "data.template=no.jinja: there is no such file"


@pytest.mark.parametrize("family", ["qwen2.5-0.5b-instruct", LLAMA])
def test_a_chat_has_the_tokens_of_the_models_own_template(tmp_path: Path, family: str) -> None:
    """Checklist 24. Llama's template writes the start token, and its tokenizer would add it once more."""
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(tmp_path)
    corpus = made(tmp_path, rows(20), chat=True, tokenizer=str(tmp_path))
    for row, text in zip(corpus.prompts("train"), corpus.texts("train"), strict=True):
        asked = [{"role": "user", "content": f"question {row.metadata['id']}"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert tokenizer(row.prompt)["input_ids"] == ids
        answered = [*asked, {"role": "assistant", "content": f"answer {row.metadata['id']}"}]
        whole = tokenizer.apply_chat_template(answered)["input_ids"]
        own = tokenizer(text)["input_ids"]
        assert own == whole[: len(own)]


def test_messages_are_chats_and_their_last_one_is_the_answer(tmp_path: Path) -> None:
    content = [{"m": chat(f"one {i}", "two", f"three {i}", f" four {i} ")} for i in range(20)]
    corpus = made(tmp_path, content, Columns(response="m"), chat_template="templates/human_assistant.jinja")
    assert "\n\nHuman: one 3\n\nAssistant: two\n\nHuman: three 3\n\nAssistant: four 3" in {
        text for split in SPLITS for text in corpus.texts(split)
    }


def test_a_prompt_of_messages_with_answers_of_one_message(tmp_path: Path) -> None:
    """The form that TRL calls conversational."""
    content = [
        {"p": chat(f"one {i}"), "c": [{"role": "assistant", "content": "yes"}], "r": [chat("", "no")[1]]}
        for i in range(20)
    ]
    form = Columns(prompt="p", chosen="c", rejected="r")
    pair = made(tmp_path, content, form, chat_template="templates/chatml.jinja").pairs("train")[0]
    assert pair.prompt.startswith("<|im_start|>user\none ")
    assert (pair.chosen, pair.rejected) == ("yes", "no")


def test_a_missing_chat_template_says_how_to_give_one(tmp_path: Path) -> None:
    tokenizer_of("gpt2").save_pretrained(tmp_path)
    message = refusal(tmp_path, rows(20), chat=True, tokenizer=str(tmp_path))
    assert message == (
        f"the tokenizer of {tmp_path} has no chat template: give one with data.chat_template=FILE "
        "(templates/chatml.jinja is one)"
    )
    assert "a model made from scratch has no chat template" in refusal(tmp_path, rows(20), chat=True)


def test_a_chat_template_that_refuses_says_where(tmp_path: Path) -> None:
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('no system here') }}")
    message = refusal(tmp_path, rows(20), chat=True, chat_template=str(tmp_path / "strict.jinja"))
    assert message == f"{tmp_path / 'rows.jsonl'}:1: the chat template refuses the messages: no system here"


def test_a_system_message_needs_a_chat(tmp_path: Path) -> None:
    assert "plain text has no system message; add data.chat=true" in refusal(tmp_path, rows(20), system="Hi")


# ------------------------------------------------------------------------------------------------- wrong columns


def test_no_prompt_at_all_is_refused(tmp_path: Path) -> None:
    assert "name their column (data.columns.prompt) or give data.template" in refusal(
        tmp_path, rows(20), Columns(response="a")
    )


@pytest.mark.parametrize(
    ("row", "form", "words"),
    [
        ({"q": "a", "A": "b"}, PLAIN, "has no column 'a', only ['A', 'q']"),
        ({"q": ["x"], "a": "b"}, PLAIN, "column 'q': a message needs a text role and content, but is 'x'"),
        ({"q": {"x": 1}, "a": "b"}, PLAIN, "column 'q' must be a text or a list of messages, but is {'x': 1}"),
        (
            {"q": '[{"role": "user"', "a": "b"},
            PLAIN,
            "column 'q' holds messages written as a text: they must be a list",
        ),
        ({"q": "a", "a": " [{'content': 'x'}]"}, PLAIN, "column 'a' holds messages written as a text"),
        ({"q": True, "a": "b"}, PLAIN, "column 'q' must be a text or a list of messages, but is True"),
        ({"q": "a", "a": {"z": 1}}, Columns("q", "a.b"), "has no column 'a.b', only ['z']"),
        ({"q": "a", "a": "z"}, Columns("q", "a.b"), "has no column 'a.b', only a str"),
        ({"q": "a", "good": "b"}, PAIRS, "has no column 'bad', only ['good', 'q']"),
        (
            {"q": "a", "good": "b", "bad": "c", "s": "high", "t": 1},
            Columns("q", chosen="good", rejected="bad", chosen_score="s", rejected_score="t"),
            "column 's' must be a number, but is 'high'",
        ),
        ({"text": ["x"]}, PrefixPrompt("text", 2), "a message needs a text role"),
        ({"c": "Human: a", "r": "x"}, Dialogues("c", "r"), "column 'c' must begin with \"\\n\\nHuman:\""),
        ({"s": [{"t": "x"}], "c": 0, "p": "y"}, Comparisons("s", "t", "c", "p"), "must be a list of two answers"),
        ({"s": [{"t": "x"}] * 2, "c": 2, "p": "y"}, Comparisons("s", "t", "c", "p"), "must be 0 or 1, but is 2"),
        ({"s": [{"t": "x"}] * 2, "c": 1}, Comparisons("s", "t", "c", "p"), "has no column 'p', only ['c', 's']"),
    ],
)
def test_a_wrong_column_is_named_with_file_and_line(
    tmp_path: Path, row: dict[str, Any], form: RowFormat, words: str
) -> None:
    message = refusal(tmp_path, [row], form)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:1")
    assert words in message


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ({"c": chat("a", "b"), "r": chat("x", "b")}, Columns(chosen="c", rejected="r"), "prompts differ"),
        ({"c": chat("a"), "r": chat("a")}, Columns(chosen="c", rejected="r"), "no answer"),
        ({"c": f"{HUMAN} a{REPLY} b", "r": f"{HUMAN} x{REPLY} c"}, Dialogues("c", "r"), "prompts differ"),
        ({"c": "\n\nHuman: a", "r": "\n\nHuman: a"}, Dialogues("c", "r"), "no answer"),
        ({"text": "too few"}, PrefixPrompt("text", 2), "too short"),
        (
            {"q": "a", "good": "b", "bad": "c", "s": 3, "t": 3.0},
            Columns("q", chosen="good", rejected="bad", chosen_score="s", rejected_score="t"),
            "scores do not order the pair",
        ),
    ],
)  # fmt: skip
def test_a_row_that_no_form_can_use_falls_and_is_counted(
    tmp_path: Path, row: dict[str, Any], form: RowFormat, reason: str
) -> None:
    message = refusal(tmp_path, [row], form)
    assert f"1 {reason} (first: {tmp_path / 'rows.jsonl'}:1)" in message


def test_columns_that_belong_together_are_named_together() -> None:
    with pytest.raises(DataError, match="chosen and rejected belong together"):
        Columns(prompt="q", chosen="good")
    with pytest.raises(DataError, match="chosen_score and rejected_score belong together"):
        Columns(prompt="q", chosen="good", rejected="bad", rejected_score="s")


def test_a_set_without_answers_has_prompts_only(tmp_path: Path) -> None:
    corpus = made(tmp_path, rows(20), Columns(prompt="q"))
    assert len(corpus.prompts("train")) == 16
    with pytest.raises(DataError, match=r"has no response answers here: name their column with data\.columns\.resp"):
        corpus.texts("train")


def test_numbers_are_texts_and_nested_columns_are_reached(tmp_path: Path) -> None:
    content = [{"x": {"q": f"what {i}"}, "a": i} for i in range(20)] + [{"x": {"q": 10**400}, "a": 1}]
    corpus = made(tmp_path, content, Columns("x.q", "a"))
    assert "what 7 7" in {text for split in SPLITS for text in corpus.texts(split)}
