"""The Python page and the notebook run as they stand, in order, in an empty folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FOREIGN_WARNINGS

ROOT = Path(__file__).parents[2]
# Lightning without tensorboard, whose place its own CSV logger takes
NO_TENSORBOARD = "ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning"
pytestmark = [*FOREIGN_WARNINGS, pytest.mark.filterwarnings(NO_TENSORBOARD)]

PAGE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
NOTEBOOK = json.loads((ROOT / "examples" / "python_api.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def lines_of_code(block: str) -> int:
    """Lines that are neither empty nor a comment, imports included."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in block.splitlines())


def run(blocks: list[str]) -> dict[str, Any]:
    """All blocks, one after the other in one namespace; what is in it at the end."""
    names: dict[str, Any] = {"__name__": "__page__"}
    torch.manual_seed(0)
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    return names


def ppo_block(blocks: list[str]) -> str:
    """The one that defines a corpus and a reward and trains on them."""
    (block,) = [block for block in blocks if "(Corpus)" in block and "def score" in block and ".fit(" in block]
    return block


def test_ppo_on_own_data_and_reward_takes_twenty_lines() -> None:
    assert lines_of_code(ppo_block(PAGE)) <= 20
    assert "hydra" not in "".join(PAGE + CELLS)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And shows what it promises: a better policy, a folder that transformers loads, a checkpoint that comes back."""
    monkeypatch.chdir(tmp_path)
    first = run(PAGE[:5])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if re.match(r"(sft|ppo|improvement) -?\d", line)] == [
        "sft", "ppo", "improvement",
    ]  # fmt: skip
    assert first["module"].episodes == 20 * 64
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    scores = [float(row.split(",")[rows[0].split(",").index("rollout/score")] or "nan") for row in rows[1:]]
    scores = [score for score in scores if score == score]
    assert len(scores) == 20
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3
    AutoTokenizer.from_pretrained("better/model")
    ids = torch.arange(3, 9).unsqueeze(0)
    exported = AutoModelForCausalLM.from_pretrained("better/model")(input_ids=ids).logits
    loaded = first["again"].roles.merged_policy()(input_ids=ids).logits
    torch.testing.assert_close(loaded, exported, atol=1e-5, rtol=1e-4)

    assert [text[:12] for text in first["texts"]] == ["the film was", "the plot was"]
    assert max(map(len, first["texts"])) > 12

    rest = run([PAGE[0], PAGE[1].split("roles = ")[0], *PAGE[5:]])
    assert rest["module"].episodes == 2 * 64
    assert rest["loss"].shape == (2, 3)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines_of_code(ppo_block(CELLS)) <= 20
    names = run(CELLS)
    assert names["module"].result()["improvement"]["score"].value > 0
    assert [text[:12] for text in names["texts"]] == ["the film was", "the plot was"]
