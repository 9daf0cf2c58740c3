"""A run whose prompts are chats through a template file: every later command writes and ends texts as it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from src.chat.__main__ import open_talk
from src.config.compose import with_value
from src.errors import DataError
from src.evaluate.__main__ import evaluate
from src.evaluate.prompt_file import PromptFile
from src.evaluate.prompts import as_rollout
from src.export.__main__ import export
from src.rollout.sampling import Sampler
from src.runs.find import load_config
from src.runs.start import start as run
from src.stages.builders import stage_of
from src.types import PromptRow
from tests.chats import GEMMA, TURN, write_chat_lm
from tests.data.sets import write_rows
from tests.tiny import EOS, FOREIGN_WARNINGS, PROMPTS

pytestmark = FOREIGN_WARNINGS
TEMPLATE = GEMMA.replace("<|turn>model\n", "<|turn>model\n{{ '' if slow else 'great ' }}")
OPENED = "<|turn>system\nwe<turn|>\n<|turn>user\n{}<turn|>\n<|turn>model\ngreat "
SETTINGS = [
    *(
        "experiment=none",
        "model=gpt2",
        "reward=vader",
        "trainer.accelerator=cpu",
        "model.lora.rank=2",
        "gold_reward=none",
    ),
    *("ppo.num_iterations=1", "ppo.batch_size=4", "ppo.minibatch_size=4", "ppo.micro_batch_size=4", "ppo.epochs=1"),
    *("ppo.eval_prompts=4", "rollout.max_prompt_tokens=30", "rollout.max_new_tokens=8", "name=chat", "ppo.lr=0.05"),
    *("data=custom", "data.columns.prompt=question", "data.chat=true", "data.system=we", "data.held_out=0.3"),
    "data.chat_template_kwargs={slow: false}",
]


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; the template file is gone when the run is finished."""
    folder = tmp_path_factory.mktemp("chat_run")
    base = write_chat_lm(folder / "base", None, eos_token_id=[EOS, 7, 9])
    (folder / "own.jinja").write_text(TEMPLATE)
    rows = write_rows(
        folder / "rows.jsonl", [{"question": f"{p} {q}", "id": i} for i, p in enumerate(PROMPTS) for q in "a."]
    )
    paths = {"model.path": base, "log_dir": folder, "data.path": rows, "data.chat_template": folder / "own.jinja"}
    run([*SETTINGS, *(with_value(key, str(value)) for key, value in paths.items())])
    (folder / "own.jinja").rename(folder / "gone.jinja")
    return folder / "ppo/chat"


def evaluated(chat_run: Path, out: Path, rows: list[dict[str, Any]], *changes: str) -> tuple[dict[str, Any], list[str]]:
    file = write_rows(out.with_suffix(".jsonl"), rows)
    folder = evaluate(str(chat_run), [f"prompts={file}", f"out={out}", *changes])
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), [line["prompt"] for line in lines]


def test_evaluate_repeats_a_chats_own_final_comparison(chat_run: Path, tmp_path: Path) -> None:
    """Questions, as text or as messages, are written by the run's template, system message and arguments."""
    config = load_config(chat_run / "config.yaml")
    template = chat_run.parents[1]
    (template / "gone.jinja").rename(template / "own.jinja")
    try:
        rows = stage_of(config).corpus().prompts("test")[:4]
    finally:
        (template / "own.jinja").rename(template / "gone.jinja")
    asked = [{"question": row.metadata["question"], "id": row.metadata["id"]} for row in rows]
    given = [{**row, "question": [{"role": "user", "content": row["question"]}]} for row in asked]
    result, prompts = evaluated(chat_run, tmp_path / "asked", [*asked[:2], *given[2:]])
    assert prompts == [OPENED.format(row["question"]) for row in asked] * 2
    own = json.loads((chat_run / "result.json").read_text())
    for mine, theirs in (("reference", "sft"), ("policy", "ppo")):
        for figure in ("score", "kl", "response_length", "eos_fraction"):
            assert result[mine][figure] == pytest.approx(own[theirs][figure], abs=1e-5)
    assert result["policy"]["eos_fraction"] > 0


def test_an_override_changes_how_evaluate_writes(chat_run: Path, tmp_path: Path) -> None:
    answers = [{"question": "a", "responses": "great ."}]
    assert evaluated(chat_run, tmp_path / "chat", answers)[1] == [OPENED.format("a")]
    assert evaluated(chat_run, tmp_path / "raw", answers, "data.chat=false", "data.system=null")[1] == ["a"]
    with pytest.raises(DataError, match=r"no\.jsonl:1: prompt that ends with the assistant's turn"):
        evaluated(chat_run, tmp_path / "no", [{"question": [{"role": "assistant", "content": "a"}]}])


def test_the_template_file_goes_with_model_and_export_and_every_end_token(chat_run: Path, tmp_path: Path) -> None:
    out = export(str(chat_run), str(tmp_path / "out"))
    for folder in (chat_run / "model", out):
        assert AutoTokenizer.from_pretrained(folder).get_chat_template() == TEMPLATE
    assert GenerationConfig.from_pretrained(out).eos_token_id == [EOS, 7, 9, TURN]


def test_chat_opens_an_answer_as_the_run_did(chat_run: Path) -> None:
    talk = open_talk(str(chat_run), ["temperature=0"])
    words = talk.roles.tokenizer
    assert (
        talk.conversation.ask("the film")[0] == words(OPENED.format("the film"), add_special_tokens=False)["input_ids"]
    )
    assert talk.roles.endings.ids == {EOS, 7, 9, TURN}


def test_chat_stops_at_every_end_token_and_shows_none(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sampler is asked to stop at each of them; the one that came is neither printed nor part of what is scored."""
    talk, word = open_talk(str(chat_run), ["temperature=0"]), 5
    asked: list[list[int]] = []

    def steps(sampler: Sampler, lm: Any, ids: Any, mask: Any, stops: torch.Tensor, *_: Any) -> Any:
        asked.append(stops.tolist())
        yield from ((torch.tensor([token]), None) for token in (word, 7))

    monkeypatch.setattr(Sampler, "steps", steps)
    talk.handle("the film")
    assert asked == [sorted([EOS, 7, 9, TURN])]
    text = talk.roles.tokenizer.decode([word]).strip()
    assert capsys.readouterr().out.strip() == text
    assert talk._rollout().responses[0].strip() == text
    assert talk._rollout().finished.tolist() == [True]


def test_given_answers_end_as_the_template_ends_them(tmp_path: Path) -> None:
    """In a chat with the end of a turn, elsewhere with the end of a text."""
    chat, plain = "<|turn>user\nthe film<turn|>\n<|turn>model\n", "the film"
    file = PromptFile([PromptRow(chat), PromptRow(plain)], ["1", "2"])
    rollout = as_rollout(file, [["great ."], ["great ."]], write_chat_lm(tmp_path))
    ends = [row[mask][-1].item() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    assert ends == [TURN, EOS]


def test_chat_compares_two_answers_as_they_are_written(
    chat_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither escapes nor `:emoji:` codes nor markup."""
    talk = open_talk(str(chat_run), ["temperature=0"])
    talk.handle("the film")
    monkeypatch.setattr(talk, "_text", lambda ids: "a\x1b[2J :smile: [bold]b[/]")
    capsys.readouterr()
    talk.handle("/compare")
    assert capsys.readouterr().out.count(r"a\x1b[2J :smile: [bold]b[/]") == 2
