"""lm_eval reads an exported model without a network; run by `make eval-check`, as lm_eval is an extra."""

from __future__ import annotations

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.export.__main__ import export

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's own and its libraries'
CHOICES = ("great .", "bad .")


def test_lm_eval_scores_an_exported_model_as_transformers_does(tiny_run, tmp_path):
    out = str(export(str(tiny_run[0]), str(tmp_path / "out")))
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={out},device=cpu", tasks=["verdict"],
        task_manager=TaskManager(include_path="tests/lm_eval_tasks"), log_samples=True,
    )  # fmt: skip
    model, words = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    right = []
    for sample in found["samples"]["verdict"]:
        logprobs = []
        for choice in CHOICES:
            start, whole = (
                words(text)["input_ids"] for text in (sample["doc"]["text"], f"{sample['doc']['text']} {choice}")
            )
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            logprobs.append(sum(scores[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
        assert [reply[0] for reply in sample["filtered_resps"]] == pytest.approx(logprobs, abs=1e-4)
        right.append(logprobs.index(max(logprobs)) == sample["doc"]["label"])
    assert found["results"]["verdict"]["acc,none"] == sum(right) / 4
