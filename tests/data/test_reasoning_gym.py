"""Tasks of reasoning-gym: their questions, their verifiers, and runs on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.reasoning_gym import ReasoningGym
from src.errors import DataError, RewardError, SettingError
from src.rewards.reasoning_gym import TaskVerifier
from src.runs.start import start
from src.types import PromptRow
from src.utils.gym import task_of
from tests.conftest import TINY_RUN
from tests.tiny import FOREIGN_WARNINGS, write_lm

pytest.importorskip("reasoning_gym", reason="the extra `real` is not installed (make real-check)")

pytestmark = FOREIGN_WARNINGS
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"max_word_len": 5},
    "gcd": {"max_value": 60},
    "prime_factorization": {"max_value": 200},
    "number_sorting": {"max_numbers": 3},
}
SPLITS = ("train", "validation", "test")


def corpus(task: str = "chain_sum", **settings: Any) -> ReasoningGym:
    return ReasoningGym(task, TASKS[task], **({"questions": 100, "chat": False} | settings))


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_in_two_splits_and_every_answer_is_right(task: str) -> None:
    """Each split has its share of the distinct questions, and the verifier gives each task's own answer full marks."""
    found = {split: corpus(task).prompts(split) for split in SPLITS}
    questions = [row.prompt for rows in found.values() for row in rows]
    assert len(questions) == len(set(questions))
    assert len(found["validation"]) == len(found["test"]) == round(len(questions) * 0.1)
    rows = found["test"]
    answers = [str(row.metadata["answer"]) for row in rows]
    marks = TaskVerifier().score([], answers, [row.metadata for row in rows])
    assert marks.tolist() == [1.0] * len(rows)


def test_questions_repeat_no_more_than_their_seed() -> None:
    assert corpus().prompts("train") == corpus().prompts("train")
    assert corpus().prompts("train") != corpus(seed=2).prompts("train")


def test_texts_end_with_the_answer_in_its_format() -> None:
    made = corpus(answer_format="so <answer>{answer}</answer>")
    for text, row in zip(made.texts("test"), made.prompts("test"), strict=True):
        assert text == f"{row.prompt} so <answer>{row.metadata['answer']}</answer>"


def test_a_question_is_a_message_of_a_chat(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] ")
    made = corpus(chat=True, system="Be brief.", chat_template=str(template))
    plain = corpus().prompts("test")[0].prompt
    assert made.prompts("test")[0].prompt == f"[system] Be brief.\n[user] {plain}\n[assistant] "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "chain_summ"}, r"data\.task=chain_summ: .* did you mean chain_sum"),
        ({"task": "zzzz"}, r"data\.task=zzzz: reasoning-gym has no such task"),
        ({"params": {"min_terms": 9}}, r"data\.params=.*the task chain_sum refuses them: max_terms"),
        ({"params": {"terms": 9}}, r"the task chain_sum refuses them: .*'terms'"),
    ],
)
def test_what_the_package_does_not_know_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ReasoningGym(**({"task": "chain_sum"} | settings))


def test_too_few_distinct_questions() -> None:
    with pytest.raises(DataError, match=r"data\.task=chain_sum: only \d distinct questions"):
        ReasoningGym("chain_sum", {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}, 20, chat=False)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"not installed: pip install -e '\.\[real\]'"):
        task_of("chain_sum", None)


def row_of(task: str) -> PromptRow:
    return corpus(task).prompts("test")[0]


def test_the_last_match_of_the_pattern_is_the_answer() -> None:
    row = row_of("chain_sum")
    right = row.metadata["answer"]
    responses = [
        f"<a>7000</a> no, <a> {right} </a>",
        f"<a>{right}</a> no, <a>7000</a>",
        f"it is {right}",
    ]
    verifier = TaskVerifier("<a>(.*?)</a>")
    parts = verifier.score_parts([], responses, [row.metadata] * 3)
    assert parts["mark"].tolist() == [1.0, 0.0, 0.0]
    assert parts["without_answer"].tolist() == [0.0, 0.0, 1.0]
    assert torch.equal(verifier.combine(parts), parts["mark"])


def test_an_answer_on_which_the_verifier_fails_is_counted() -> None:
    """The parser of prime factors raises on words; a whole empty response has no answer."""
    row = row_of("prime_factorization")
    parts = TaskVerifier().score_parts([], ["two times three", "  "], [row.metadata] * 2)
    assert parts["mark"].tolist() == [0.0, 0.0]
    assert parts["failed"].tolist() == [1.0, 0.0]
    assert parts["without_answer"].tolist() == [0.0, 1.0]


def test_partial_marks_are_not_right() -> None:
    """For an answer that holds the right one the package's own rule gives the share of its letters."""
    row = row_of("chain_sum")
    right = row.metadata["answer"]
    parts = TaskVerifier().score_parts([], [f"{right} it is"], [row.metadata])
    assert parts["mark"].item() == pytest.approx(len(right) / len(f"{right} it is"))
    assert parts["right"].item() == 0.0


def test_rows_of_another_data_set_are_refused() -> None:
    with pytest.raises(RewardError, match="entry"):
        TaskVerifier().score([], ["1"], [{"answer": "1"}])


def test_a_pattern_needs_one_group() -> None:
    with pytest.raises(SettingError, match="one group"):
        TaskVerifier("a|b")


@pytest.mark.parametrize(
    "task", ["chain_sum", *(pytest.param(t, marks=pytest.mark.slow) for t in TASKS if t != "chain_sum")]
)
def test_a_task_trains(task: str, tmp_path: Path) -> None:
    """Two iterations through the command line's own road; each part of the verdict is logged."""
    params = ",".join(f"{key}: {value}" for key, value in TASKS[task].items())
    result = start(
        [
            *(o for o in TINY_RUN if not o.startswith(("reward=", "data.", "experiment="))),
            *("experiment=none", "data=reasoning_gym", "reward=reasoning_gym", "gold_reward=none", f"data.task={task}"),
            *(f"data.params={{{params}}}", "data.questions=60", "data.chat=false", f"log_dir={tmp_path}"),
            f"model.path={write_lm(tmp_path / 'base')}",
        ]
    )
    assert 0 <= result["ppo"]["score"] <= 1
    table = next((tmp_path / "ppo").glob("*/metrics.csv")).read_text()
    for name in ("right", "without_answer", "failed"):
        assert f"rollout/score_{name}" in table


def test_every_process_asks_the_same_questions() -> None:
    """A task that goes through a set of letters, whose order Python draws for each process."""
    code = "from src.utils.gym import entries_of; print([e['question'] for e in entries_of('ransom_note', None, 5, 1)])"
    made = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1] != b"[]\n"


def test_a_task_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import reasoning_gym.arithmetic.chain_sum as c\n"
        "def fails(self, number): raise RuntimeError('no such number')\n"
        "c.ChainSumDataset.__getitem__ = fails\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = r"data\.task=chain_sum: reasoning-gym cannot make its questions: RuntimeError: no such number"
    with pytest.raises(DataError, match=said):
        corpus()
