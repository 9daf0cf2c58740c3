"""What `save` writes, read back by plain transformers and peft in a process that never saw this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from src.models.roles import LoraRoles
from tests.tiny import FOREIGN_WARNINGS, make_module, make_roles, plain_model, write_lm

pytestmark = FOREIGN_WARNINGS

IDS = [[4, 7, 9, 5, 6, 11]]
READER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, run = sys.argv[1:]
ids = torch.tensor(json.loads(sys.stdin.read()))
merged, info = AutoModelForCausalLM.from_pretrained(run + "/model", output_loading_info=True)
adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run + "/adapter")
words = [len(AutoTokenizer.from_pretrained(run + folder)) for folder in ("/model", "/adapter")]
missing = [sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
with torch.no_grad():
    logits = [model.eval()(input_ids=ids).logits[0].tolist() for model in (merged, adapter)]
print(json.dumps({"logits": logits, "info": missing, "words": words, "src": "src" in sys.modules}))
"""


def keys(folder: Path) -> list[str]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


@pytest.mark.slow
def test_exported_folders_give_the_adapter_models_logits_in_a_fresh_process(tmp_path: Path) -> None:
    """Checklist 65. Merged folder and adapter folder; the value head and the critic are in neither."""
    base = write_lm(tmp_path / "base")
    roles = make_roles(base, spread=0.2)
    with torch.no_grad():
        expected = plain_model(roles, "policy")(input_ids=torch.tensor(IDS)).logits[0]
        reference = plain_model(roles, "reference")(input_ids=torch.tensor(IDS)).logits[0]
    assert (expected - reference).abs().max() > 0.1
    assert make_module(roles).save(tmp_path / "run") == tmp_path / "run" / "model"
    with torch.no_grad():  # writing changed nothing
        assert torch.equal(plain_model(roles, "policy")(input_ids=torch.tensor(IDS)).logits[0], expected)
    answer = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", READER, base, str(tmp_path / "run")], input=json.dumps(IDS),
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    for logits in told["logits"]:
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)
    assert told["info"] == [[], [], []]
    assert told["words"] == [len(roles.tokenizer)] * 2
    assert not told["src"]
    for folder in ("model", "adapter"):
        names = keys(tmp_path / "run" / folder)
        assert names
        assert not [name for name in names if "value_head" in name or "critic" in name or "policy" in name]
    assert not [name for name in keys(tmp_path / "run" / "model") if "lora" in name]
    assert all("lora_" in name for name in keys(tmp_path / "run" / "adapter"))
    assert sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir() if path.is_dir()) == []


def test_fully_trained_policies_are_exported_without_an_adapter(tmp_path: Path) -> None:
    """Checklist 65."""
    roles = make_roles(write_lm(tmp_path / "base"), None, spread=0.1)
    make_module(roles).save(tmp_path / "run")
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            lm(input_ids=torch.tensor(IDS)).logits, plain_model(roles, "policy")(input_ids=torch.tensor(IDS)).logits
        )
    assert not (tmp_path / "run" / "adapter").exists()


def test_saving_twice_is_saving_once(tmp_path: Path) -> None:
    """Checklist 65. A second export of the same run replaces the first."""
    roles = make_roles(write_lm(tmp_path / "base"), spread=0.2)
    assert isinstance(roles, LoraRoles)
    for _ in range(2):
        make_module(roles).save(tmp_path / "run")
    assert all("lora_" in name for name in keys(tmp_path / "run" / "adapter"))
