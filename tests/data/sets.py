"""A dozen made-up rows in the true schema of each ready set, one split or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

N = 12
Rows = list[dict[str, Any]]


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages by turns, the user first."""
    return [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(turns)]


def gsm8k(start: int = 0) -> Rows:
    """openai/gsm8k, main: question and answer."""
    return [
        {
            "question": f"Ann has {i} apples and buys {i} more. How many has she?",
            "answer": f"She has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i} apples.\n#### {2 * i}",
        }
        for i in range(start, start + N)
    ]


def imdb(start: int = 0) -> Rows:
    """stanfordnlp/imdb: text and label."""
    return [
        {"text": f"On day {i} I saw this film.<br /><br />It was  {('bad', 'good')[i % 2]} fun.", "label": i % 2}
        for i in range(start, start + N)
    ]


def hh_rlhf(start: int = 0) -> Rows:
    """Anthropic/hh-rlhf: two whole dialogues."""
    rows = []
    for i in range(start, start + N):
        first = f"\n\nHuman: How do I plant tree {i}?\n\nAssistant: Where is it to stand?" if i % 2 else ""
        prompt = f"{first}\n\nHuman: In garden {i}.\n\nAssistant:"
        rows.append({"chosen": f"{prompt} Dig a deep hole.", "rejected": f"{prompt} I do not know. "})
    return rows


def ultrafeedback_binarized(start: int = 0) -> Rows:
    """HuggingFaceH4/ultrafeedback_binarized, the splits for preferences."""
    rows = []
    for i in range(start, start + N):
        question, good, bad = f"Name {i + 2} colors.", "Red, blue and more.", "No."
        rows.append(
            {
                "prompt": question,
                "prompt_id": f"{i:064x}",
                "chosen": chat(question, good),
                "rejected": chat(question, bad),
                "messages": chat(question, good),
                "score_chosen": 8.5,
                "score_rejected": 4.0 + i % 3,
            }
        )
    return rows


def tldr(start: int = 0) -> Rows:
    """trl-lib/tldr: prompt and completion."""
    return [{"prompt": _post(i), "completion": f" My dog {i} ran away."} for i in range(start, start + N)]


def comparisons(start: int = 0) -> Rows:
    """openai/summarize_from_feedback, comparisons: two summaries and the choice."""
    return [
        {
            "info": {
                "id": f"t3_{i}", "post": f"I have dog {i} and it ran away.", "title": f"Dog {i}", "subreddit": "dogs",
                "site": None, "article": None,
            },
            "summaries": [
                {"text": f" Dog {i} ran.", "policy": "sup1", "note": None},
                {"text": " I am sad.", "policy": "ref", "note": None},
            ],
            "choice": i % 2,
            "worker": "w",
            "batch": "batch3",
            "split": "train",
            "extra": {"confidence": None},
        }
        for i in range(start, start + N)
    ]  # fmt: skip


def _post(i: int) -> str:
    return f"SUBREDDIT: r/dogs\n\nTITLE: Dog {i}\n\nPOST: I have dog {i} and it ran away.\n\nTL;DR:"


def write_rows(file: Path, rows: Rows) -> Path:
    """A file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_set(folder: Path, name: str) -> list[str]:
    """A folder in the form of the set; returns the overrides that name it."""
    if name == "tldr":
        for number, split in enumerate(("train", "validation", "test")):
            write_rows(folder / f"{split}.jsonl", tldr(number * N))
        write_rows(folder / "comparisons/train.jsonl", comparisons())
        write_rows(folder / "comparisons/validation.jsonl", comparisons(4 * N))
        pairs = folder / "comparisons"
        return [f"data.path={folder}", f"data.pairs.path={pairs}", "data.pairs.folder=null"]
    rows = {"gsm8k": gsm8k, "imdb": imdb, "hh_rlhf": hh_rlhf, "ultrafeedback_binarized": ultrafeedback_binarized}[name]
    suffix = "_prefs" if name == "ultrafeedback_binarized" else ""
    write_rows(folder / f"train{suffix}.jsonl", rows(0))
    write_rows(folder / f"test{suffix}.jsonl", rows(N))
    return [f"data.path={folder}"]
