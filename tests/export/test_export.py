"""`python -m src.export`: what it writes, that a fresh process gets the run's logits from it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from src.errors import ModelError
from src.export import __main__ as command
from src.export.__main__ import export
from src.export.model_card import _without_folders
from tests.tiny import EOS, FOREIGN_WARNINGS, PAD

pytestmark = FOREIGN_WARNINGS

IDS = [[4, 7, 9, 5, 6, 11]]
READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(input_ids=ids).logits[0].tolist()
torch.manual_seed(0)
answer = model.generate(ids, attention_mask=torch.ones_like(ids))
print(json.dumps({"logits": logits, "words": len(AutoTokenizer.from_pretrained(folder)),
                  "new": answer.shape[1] - ids.shape[1], "src": "src" in sys.modules}))
"""


def test_a_fresh_process_gets_the_logits_of_base_and_adapter(tiny_run, tmp_path, capsys):
    """Checklist 65. Through the command, in a process that knows transformers only."""
    run, base = tiny_run
    out = export(str(run), str(tmp_path / "out"))
    assert "loaded again: outputs differ by at most" in capsys.readouterr().out
    answer = subprocess.run(
        [sys.executable, "-c", READER, str(out), json.dumps(IDS)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor(IDS)).logits[0]
        with adapted.disable_adapter():
            before = adapted(input_ids=torch.tensor(IDS)).logits[0]
    torch.testing.assert_close(torch.tensor(told["logits"]), expected, atol=1e-5, rtol=0)
    assert (expected - before).abs().max() > 1e-2  # PPO moved the policy, so that this is no comparison with the base
    assert not told["src"]
    assert 1 <= told["new"] <= 6  # rollout.max_new_tokens


def test_generation_config_and_card_say_what_was_trained(tiny_run, tmp_path):
    run, _ = tiny_run
    out = export(str(run), str(tmp_path / "out"))
    assert {"adapter", "config.json", "model.safetensors", "README.md"} <= {path.name for path in out.iterdir()}
    made = GenerationConfig.from_pretrained(out)
    assert (made.do_sample, made.temperature, made.top_k, made.top_p) == (True, 0.9, 0, 1.0)
    assert (made.eos_token_id, made.pad_token_id, made.max_new_tokens) == (EOS, PAD, 6)
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    result = json.loads((run / "result.json").read_text())
    low, high = result["ppo"]["interval"]["score"]
    assert f"| ppo.score | {result['ppo']['score']:.3f} | {low:.3f} to {high:.3f} | 6 |" in card.text
    assert "License: to be filled in" in card.text


def test_the_license_of_the_base_is_taken_over(tiny_run, tmp_path):
    run, base = tiny_run
    note = Path(base) / "README.md"
    note.write_text("---\nlicense: mit\n---\n# base\n", encoding="utf-8")
    try:
        card = ModelCard.load(export(str(run), str(tmp_path / "out")) / "README.md")
    finally:
        note.unlink()
    assert card.data.license == "mit"
    assert "License of the base model: mit." in card.text


def test_a_pipelines_folder_stands_for_its_ppo_stage(tiny_run, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "ppo").symlink_to(tiny_run[0])
    out = export(str(tmp_path / "pipeline"), str(tmp_path / "out"))
    assert (out / "model.safetensors").read_bytes() == (tiny_run[0] / "model/model.safetensors").read_bytes()


def test_of_an_unfinished_run_the_last_checkpoint_is_taken(tiny_run, tmp_path, capsys):
    run = tmp_path / "unfinished"
    shutil.copytree(tiny_run[0], run)
    for name in ("result.json", "checkpoints/iteration-2.ckpt"):
        (run / name).unlink()
    for name in ("model", "adapter"):
        shutil.rmtree(run / name)
    out = export(str(run), None)
    assert "unfinished" in capsys.readouterr().out
    assert "checkpoint of step 1" in (out / "README.md").read_text()
    tensors = torch.load(run / "checkpoints/iteration-1.ckpt", weights_only=True)["state_dict"]
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_run[1]), out / "adapter")
    found = {name: tensor for name, tensor in adapter.state_dict().items() if "lora_" in name}
    assert found
    for name, tensor in found.items():
        (kept,) = [
            t for n, t in tensors.items() if n.endswith(name.split("base_model.", 1)[1].replace("default", "policy"))
        ]
        assert torch.equal(tensor, kept)


def refusal(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return stopped.value.code


def test_what_it_refuses(tiny_run, tmp_path, monkeypatch, capsys):
    run, base = tiny_run
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "empty").mkdir()
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("result.json", "checkpoints", "model"))
    for arguments, sentence in {
        ("/no/such",): "/no/such: there is no such folder",
        (tmp_path / "empty",): "neither a run (no config.yaml) nor a model (no config.json)",
        (base,): "this is already a model folder",
        (run, f"out={tmp_path}/full"): "exists and is not empty",
        (tmp_path / "young",): "the run is unfinished and has no checkpoint yet",
        (run, "color=red"): "the settings of export are out=FOLDER and model.trust_remote_code=true",
    }.items():
        assert refusal(*arguments, monkeypatch=monkeypatch) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]


def test_an_export_that_came_out_wrong_is_refused_and_leaves_nothing(tiny_run, tmp_path, monkeypatch):
    def spoil(run, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(1.5)
        model.save_pretrained(folder)
        return GenerationConfig()

    monkeypatch.setattr(command, "generation_config", spoil)
    with pytest.raises(ModelError, match="its outputs differ by up to"):
        export(str(tiny_run[0]), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("data.path=/home/me/texts/rows.jsonl", "data.path=rows.jsonl"),
        ("data.path='/home/my own/texts/rows.jsonl'", "data.path='rows.jsonl'"),
        ("data.path=[/home/me/a.jsonl,/home/me/b.jsonl]", "data.path=[a.jsonl,b.jsonl]"),
        ("model.path=~/models/mine", "model.path=mine"),
        ("model.path=../models/mine", "model.path=mine"),
        ("+callbacks.z={_target_: mine.C, path: /home/me/x}", "+callbacks.z={_target_: mine.C, path: x}"),
        (["/home/me/a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        ("model.path=owner/name", "model.path=owner/name"),
        ("ppo.clip=0.1", "ppo.clip=0.1"),
        (3, 3),
    ],
)
def test_a_card_names_no_folder_of_this_machine(setting, shown):
    assert _without_folders(setting) == shown
