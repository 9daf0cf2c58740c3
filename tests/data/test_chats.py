"""Chats as data sets have them, through templates that write more or less than role and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.data.row_formats import Columns
from src.data.table_corpus import TableCorpus
from src.data.tables import SPLITS
from src.errors import DataError
from src.models.endings import endings
from src.models.text import encode_completions
from tests.data.sets import chat, write_rows
from tests.families import tokenizer_of

ONE_FILE = {"train": "train", "validation": None, "test": None}
ANSWER = "<think>\nadd one to 0\n</think>\n\nIt is 1."
# as Qwen3's: the thoughts of the last answer are written always, those of earlier ones never
THINKING = """
{%- for m in messages %}
{%- set thoughts, text = m.reasoning_content or '', m.content %}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}
{{- text }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome"}}}]
MESSAGES, PAIRS = Columns(response="m"), Columns(chosen="m", rejected="r")


def made(
    folder: Path, rows: list[dict[str, Any]], form: Columns = MESSAGES, template: str = THINKING, **options: Any
) -> TableCorpus:
    """Twenty usable rows, and those of a test."""
    (folder / "own.jinja").write_text(template)
    tokenizer_of("gpt2").save_pretrained(folder)
    usable = [{"m": chat(f"question {i}", "fine"), "r": chat(f"question {i}", "bad")} for i in range(20)]
    file = write_rows(folder / "rows.jsonl", [*usable, *rows])
    own = {"tokenizer": str(folder), "chat_template": str(folder / "own.jinja")}
    return TableCorpus(str(file), form, ONE_FILE, **(own | options))


def texts_of(corpus: TableCorpus) -> set[str]:
    return {text for split in SPLITS for text in corpus.texts(split)}


def dropped(corpus: TableCorpus) -> dict[str, int]:
    """The filters' counts; every dropped row is the 21st of the file."""
    assert ":21)" in corpus.report()
    return corpus.account["train"]["dropped"]


def asked(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"m": [{"role": "user", "content": "what is 0 + 1?"}, *messages], "r": chat("what is 0 + 1?", "bad")}


def test_an_answer_with_thoughts_is_one_block_as_the_template_writes_it(tmp_path: Path) -> None:
    opened = "<|im_start|>user\nwhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n"
    corpus = made(tmp_path, [asked({"role": "assistant", "content": ANSWER})])
    assert opened + ANSWER in texts_of(corpus)
    own = {"role": "assistant", "content": "It is 1.", "reasoning_content": "add one to 0"}
    assert opened + ANSWER in texts_of(made(tmp_path, [asked(own)]))
    pairs = made(tmp_path, [asked({"role": "assistant", "content": ANSWER})], PAIRS)
    found = [pair for split in SPLITS for pair in pairs.pairs(split) if pair.prompt == opened]
    assert [(pair.chosen, pair.rejected) for pair in found] == [(ANSWER, "<think>\n\n</think>\n\nbad")]


def test_a_prompt_that_is_no_start_of_the_whole_is_named(tmp_path: Path) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    corpus = made(tmp_path, [asked({"role": "assistant", "content": ANSWER})], **off)
    reason = (
        "answer that does not follow its prompt, as the chat template writes the prompt in another way before it "
        "(data.chat_template, data.chat_template_kwargs)"
    )
    assert dropped(corpus) == {reason: 1}
    for split in SPLITS:
        assert all(row.prompt.endswith("assistant\n<think>\n\n</think>\n\n") for row in corpus.prompts(split))
        assert all(text.endswith("<think>\n\n</think>\n\nfine") for text in corpus.texts(split))


def test_calls_and_thoughts_are_written_or_the_row_is_counted(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": CALLS}
    tail = [{"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "It is sunny."}]
    thoughts = {"role": "assistant", "content": "It is 1.", "reasoning_content": "add one"}
    assert any(text.endswith("</think>\n\n<call>look_up</call>") for text in texts_of(made(tmp_path, [asked(called)])))
    assert any("<call>look_up</call>" in text for text in texts_of(made(tmp_path, [asked(called, *tail)])))
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    for row, field in (
        (asked(called), "tool_calls"),
        (asked(called, *tail), "tool_calls"),
        (asked(thoughts), "reasoning_content"),
    ):
        corpus = made(tmp_path, [row], template=plain)
        assert dropped(corpus) == {f"message with {field}, which the chat template leaves out": 1}
        assert len(texts_of(corpus)) == 20


def test_a_template_that_leaves_out_a_part_of_the_answer_is_counted(tmp_path: Path) -> None:
    """As that of the distilled R1 models."""
    cutting = "{% for m in messages %}[{{ m.role }}] {{ m.content.split('</think>')[-1] }}{% endfor %}"
    corpus = made(tmp_path, [asked({"role": "assistant", "content": ANSWER})], template=cutting)
    assert dropped(corpus) == {"answer of which the chat template leaves out a part": 1}


def test_parts_of_text_and_null_are_served_and_images_are_counted(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "0 + 1?"}]
    user, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "1"}]}
    opened = "<|im_start|>user\nwhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert f"{opened}1" in texts_of(made(tmp_path, [{"m": [user, answer]}]))
    nothing = {"role": "system", "content": None}
    assert f"<|im_start|>system\n<|im_end|>\n{opened}1" in texts_of(made(tmp_path, [{"m": [nothing, user, answer]}]))
    image = {"role": "user", "content": [*parts, {"type": "image", "url": "x.png"}]}
    assert dropped(made(tmp_path, [{"m": [image, answer]}])) == {"message with content of the type 'image'": 1}
    assert dropped(made(tmp_path, [asked({"role": "assistant", "content": None})])) == {"an empty answer": 1}


def test_a_role_that_the_template_swallows_is_named(tmp_path: Path) -> None:
    row = {"m": [{"role": "system", "content": "Be brief."}, *chat("how are you?", "fine")]}
    reason = "message of the role 'system', of which the chat template writes nothing"
    assert dropped(made(tmp_path, [row], template=NO_SYSTEM)) == {reason: 1}
    with pytest.raises(DataError, match=f"leaves the train split empty: 0 of 20 rows; dropped: 20 {reason} "):
        made(tmp_path, [], template=NO_SYSTEM, system="Be brief.")
    swallowed = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match=r"dropped: 20 message of the role 'assistant', of which .* writes nothing"):
        made(tmp_path, [], template=swallowed)


def test_a_message_that_the_template_swallows_is_named_though_others_hold_its_words(tmp_path: Path) -> None:
    """Of a template that writes the last message only, also where that one contains the earlier ones."""
    last = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list | last %}user: {{ asked.content }}\n"
        "{% if messages[-1].role == 'assistant' %}assistant: {{ messages[-1].content }}\n{% endif %}"
    )
    turns = chat("a film", "film", "a film and a film", "fine")
    reason = "message of the role 'user', of which the chat template writes nothing"
    assert dropped(made(tmp_path, [{"m": turns}], template=last)) == {reason: 1}


def test_a_chat_without_a_word_is_no_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": None}, {"role": "assistant", "content": "fine"}]
    assert dropped(made(tmp_path, [{"m": turns}])) == {"no prompt": 1}


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path: Path) -> None:
    """A run that is resumed on the next day has the prompts of the first."""
    template = "It is {{ strftime_now('%d %b %Y, %H:%M:%S') }}.\n" + THINKING
    texts = texts_of(made(tmp_path, [], template=template))
    assert all(text.startswith("It is 26 Jul 2024, 00:00:00.") for text in texts)


def test_the_default_of_several_templates_is_used_and_none_is_guessed(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("gpt2")
    for named in ({"default": THINKING, "tool_use": "x"}, {"rag": THINKING, "tool_use": "x"}):
        tokenizer.chat_template = named
        plain = endings(tokenizer)
        assert (plain.turn is None) == ("default" not in named)
        if "default" in named:
            tokenizer.save_pretrained(tmp_path / "several")
            (text, *_) = encode_completions(tokenizer, ["question"], ["fine"], chat_template=True)
            assert "<|im_start|>user" in tokenizer.decode(text)
    tokenizer.save_pretrained(tmp_path / "none")
    usable = [{"m": chat(f"question {i}", "fine")} for i in range(20)]
    file = str(write_rows(tmp_path / "rows.jsonl", usable))
    assert len(texts_of(TableCorpus(file, MESSAGES, ONE_FILE, tokenizer=str(tmp_path / "several")))) == 20
    words = r"none has no default among its chat templates \(rag, tool_use\): give one with data.chat_template=FILE"
    with pytest.raises(DataError, match=words):
        TableCorpus(file, MESSAGES, ONE_FILE, tokenizer=str(tmp_path / "none"))


def test_a_prompt_that_ends_with_the_assistants_turn_is_named(tmp_path: Path) -> None:
    form = Columns(prompt="m")
    with pytest.raises(DataError, match=r"0 of 20 rows; dropped: 20 prompt that ends with the assistant's turn"):
        made(tmp_path, [], form)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion depth exceeded"),
        (
            "{% for i in range(99999) %}{% for j in range(9999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
            "it prints more",
        ),
    ],
)
def test_a_template_that_fails_or_prints_without_end_is_one_sentence(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: the chat template refuses the messages: {words}"):
        made(tmp_path, [], template=template)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: data\.template cannot be filled: {words}.*; the columns are"):
        TableCorpus(str(tmp_path / "rows.jsonl"), Columns(), ONE_FILE, template=str(tmp_path / "own.jinja"))


def test_arguments_of_the_template_reach_separate_pairs_too(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def pairs(**options: Any) -> TableCorpus:
        seen.update(options)
        return made(tmp_path, [], PAIRS, **options)

    off = {"enable_thinking": False}
    corpus = made(tmp_path, [], chat_template_kwargs=off, pairs=pairs)
    assert seen["chat_template_kwargs"] == off
    assert all(pair.prompt.endswith("</think>\n\n") for pair in corpus.pairs("test"))
