"""`python -m src.export`: what it writes, that a fresh process gets the run's logits from it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from src.config.compose import compose
from src.errors import ConfigError, ModelError
from src.export import __main__ as command
from src.export.__main__ import export
from src.export.model_card import _without_folders, license_of, model_card
from src.export.parity import compare
from src.runs.find import RunFolder
from tests.tiny import EOS, FOREIGN_WARNINGS, PAD, make_module, make_roles, write_lm

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


@pytest.mark.slow
def test_a_fresh_process_gets_the_logits_of_base_and_adapter(tiny_run, tmp_path, capsys):
    """Checklist 65. Through the command, in a process that knows transformers only."""
    run, base = tiny_run
    out = export(str(run), str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "loaded again: KL(base and adapter || export) is" in said
    assert "nats per token on a probe, the top token the same at 100% of its places" in said
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


def test_of_an_unfinished_run_a_damaged_checkpoint_is_not_taken(tiny_run, tmp_path, monkeypatch, capsys):
    """One flipped bit of the newest: the one before it, with a warning; with none before it a sentence."""
    run = tmp_path / "unfinished"
    shutil.copytree(tiny_run[0], run)
    (run / "result.json").unlink()
    newest = run / "checkpoints/iteration-2.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"iteration-2\.ckpt in .*: damaged; iteration-1\.ckpt is used instead"):
        out = export(str(run), str(tmp_path / "out"))
    assert "checkpoint of step 1" in (out / "README.md").read_text()
    assert newest.is_file()
    (run / "checkpoints/iteration-1.ckpt").unlink()
    assert refusal(run, f"out={tmp_path}/none", monkeypatch=monkeypatch) == 2
    assert "none of the checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("card", [b"---\nlicense: [mit\n---\n", b"\xff\xfe", b"---\n- mit\n---\n"])
def test_a_card_that_cannot_be_read_gives_no_license(card, tmp_path):
    (tmp_path / "README.md").write_bytes(card)
    assert license_of(str(tmp_path)) is None


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
    (tmp_path / "file").touch()  # under which nobody can write, not even root
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("result.json", "checkpoints", "model"))
    for arguments, sentence in {
        ("/no/such",): "/no/such: there is no such folder",
        (tmp_path / "empty",): "neither a run (no config.yaml) nor a model (no config.json)",
        (base,): "this is already a model folder",
        (run, f"out={tmp_path}/full"): "exists and is not empty",
        (tmp_path / "young",): "the run is unfinished and has no checkpoint yet",
        (run, f"out={tmp_path}/file/out"): f"cannot write to {tmp_path}/file (File exists): choose another with out=",
        (run, "color=red"): "the settings of export are out=FOLDER, dtype and model.trust_remote_code=true",
    }.items():
        assert refusal(*arguments, monkeypatch=monkeypatch) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]


def test_an_export_that_came_out_wrong_is_refused_and_leaves_nothing(tiny_run, tmp_path, monkeypatch):
    def spoil(run, folder, trusted):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(1.5)
        model.save_pretrained(folder)
        return GenerationConfig()

    monkeypatch.setattr(command, "generation_config", spoil)
    with pytest.raises(
        ModelError,
        match=r"KL\(base and adapter \|\| export\) is .* which is more than rounding: the export is not kept",
    ):
        export(str(tiny_run[0]), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def half_run(folder):
    """A run folder whose policy is an adapter on a bfloat16 base, and a small update, as PPO makes it."""
    lm = AutoModelForCausalLM.from_pretrained(write_lm(folder / "base", vocab_size=4096), dtype=torch.bfloat16)
    lm.save_pretrained(folder / "base")
    roles = make_roles(str(folder / "base"), spread=0.003, dtype="bfloat16")
    make_module(roles).save(folder / "run")
    return folder / "run", str(folder / "base")


def test_a_half_precision_merge_says_what_it_loses_of_the_update(tmp_path):
    """And is no failure: with a large vocabulary the far tail of random tokens differs, their KL does not.

    Reference: the error of each merged weight from the tensors in the folders, by hand.
    """
    source, base = half_run(tmp_path)
    found = compare(source, source / "model", base, scores=False)
    weights, merged = load_file(f"{base}/model.safetensors"), load_file(source / "model/model.safetensors")
    low = load_file(source / "adapter/adapter_model.safetensors")
    error = size = 0.0
    for name in (n.removesuffix(".lora_A.weight") for n in low if n.endswith(".lora_A.weight")):
        update = 2.0 * (low[f"{name}.lora_B.weight"].double() @ low[f"{name}.lora_A.weight"].double()).T  # alpha / rank
        key = name.removeprefix("base_model.model.") + ".weight"
        error += (merged[key].double() - weights[key].double() - update).square().sum()
        size += update.square().sum()
    assert found.lost == pytest.approx(float(error / size) ** 0.5, rel=0.05)
    assert found.lost > 0.1
    sentence = command.in_words(found, False, tmp_path)
    assert f"rounding to bfloat16 changes the update in the merged weights by {found.lost:.0%} of its size" in sentence


def test_a_merge_in_float32_keeps_the_update(tmp_path):
    source, base = half_run(tmp_path)
    shutil.copytree(source / "model", tmp_path / "out")
    run = SimpleNamespace(before=base, stage="ppo")
    command.merge(run, source, tmp_path / "out", False)
    found = compare(source, tmp_path / "out", base, scores=False)
    assert found.lost < 1e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert "changes the update" not in command.in_words(found, False, tmp_path)
    with pytest.raises(ConfigError, match="this run has not both at hand"):
        command.merge(SimpleNamespace(before=None, stage="ppo"), source, tmp_path / "out", False)


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


def test_neither_data_nor_base_nor_command_of_a_card_names_one(tmp_path):
    paths = {"data.path": "rows.jsonl", "model.path": "mine", "data.template": "t.jinja"}
    given = [f"{key}=/home/me/{name}" for key, name in paths.items()]
    run = compose(["stage=ppo", "model=gpt2", "reward=length", "data=custom", "data.columns.prompt=q", *given])
    card = model_card(RunFolder(tmp_path, run), True, None).content
    assert "/home/me" not in card
    for key, name in paths.items():
        assert f"{key}={name}" in card
