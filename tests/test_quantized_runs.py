"""Whole runs on a base in 4 or 8 bits: a reward adapter on the same base, export, resuming, the reference again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from src.errors import ConfigError, ModelError
from src.export.__main__ import export
from src.export.parity import compare
from src.models.adapter_folders import base_held_as
from src.models.inference_roles import load_inference_roles
from src.models.loading import load_tokenizer
from src.models.quantized import quantized_as
from src.models.reward_choices import SharedBaseAdapter
from src.rewards.adapter import AdapterReward
from src.rewards.learned import LearnedReward
from src.runs.start import start
from tests.conftest import TINY_RUN
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    TinyCorpus,
    make_roles,
    model_settings,
    ragged_rollout,
    tokenizer,
    write_lm,
)

pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed (make real-check)")

pytestmark = FOREIGN_WARNINGS


def reward_run(base: str, folder: Path) -> str:
    """The folder of a reward adapter that was made on the NF4 base."""
    choice = SharedBaseAdapter(model_settings(base, quantize="nf4"), replace(LORA, rank=2))
    net = choice.build(choice.build_tokenizer(TinyCorpus()), 1, False)
    assert quantized_as(net) == "nf4"
    with torch.no_grad():
        for parameter in [p for p in net.parameters() if p.requires_grad]:
            parameter += 0.2 * torch.randn_like(parameter)
    net.normalize(0.4, 1.5)
    net.save(folder, load_tokenizer(base))
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A PPO run, its base and its reward: four roles on one NF4 base."""
    folder = tmp_path_factory.mktemp("nf4")
    base = write_lm(folder / "base")
    reward = reward_run(base, folder / "reward")
    start(command(folder, base, reward))
    return folder / "ppo/tiny", base, reward


def command(folder: Path, base: str, reward: str, how: str = "nf4") -> list[str]:
    own = ["callbacks.checkpoint.keep=2", f"model.path={base}", f"log_dir={folder}", "name=tiny"]
    return [*TINY_RUN, *own, "reward=adapter", f"reward.path={reward}", f"model.quantize={how}"]


def test_reward_model_on_the_base_and_alone_give_the_same_scores(trained: tuple[Path, str, str]) -> None:
    """Those of the merged folder: base dequantized, adapter and score head."""
    _, base, path = trained
    roles, rollout = make_roles(base, quantize="nf4"), ragged_rollout()
    shared, alone = AdapterReward(path, 4).load(roles), LearnedReward(path).load()
    ids, mask = rollout.response_ids, rollout.response_mask
    model = alone.model
    rows = [ids[i][mask[i]] for i in range(len(ids))]
    found = torch.stack([roles.scores(row[None], torch.ones_like(row[None]).bool())[0] for row in rows])
    with torch.no_grad():
        expected = torch.stack([model(input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits[0, 0]
                                for row in rows])  # fmt: skip
    assert found.std() > 0.01
    assert_close(found, expected, atol=1e-4, rtol=0)
    assert shared is not None
    with pytest.raises(ModelError, match=r"trained on another base: .* with this model\.dtype and model\.quantize"):
        AdapterReward(path, 4).load(make_roles(base))


def test_the_export_is_what_was_trained(trained: tuple[Path, str, str], tmp_path: Path, capsys) -> None:
    """The base as it was held, and the adapter; the same adapter on plain weights is another model."""
    run, base, _ = trained
    out = export(str(run), str(tmp_path / "out"), "float32")
    assert "loaded again: KL(base and adapter || export) is" in capsys.readouterr().out
    found = compare(run, out, base, False)
    assert (found.difference, found.original) == (pytest.approx(0, abs=1e-9), "base and adapter")
    assert found.lost is not None
    assert found.lost < 1e-3
    assert base_held_as(str(out / "adapter")) == "nf4"
    assert "on this base in nf4" in " ".join((out / "README.md").read_text(encoding="utf-8").split())
    (out / "adapter" / "quantized.json").unlink()
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    (plain / "adapter" / "quantized.json").unlink()
    assert compare(plain, out, base, False).difference > 1e-4


def test_it_is_resumed_to_the_bit_and_only_on_the_same_base(trained: tuple[Path, str, str], tmp_path: Path) -> None:
    """The checkpoint holds adapters only; the base is loaded and quantized again."""
    run, base, reward = trained
    saved = torch.load(run / "checkpoints/iteration-1.ckpt", weights_only=True)
    assert all("lora_" in name or "value_head" in name for name in saved["state_dict"])
    for again in (tmp_path / "same", tmp_path / "other"):
        shutil.copytree(run, again / "ppo/tiny")
        for path in ("result.json", "checkpoints/iteration-2.ckpt"):
            (again / "ppo/tiny" / path).unlink()
    start(command(tmp_path / "same", base, reward))
    files = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, tmp_path / "same/ppo/tiny")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(x, files[1][name]) for name, x in files[0].items())
    with pytest.raises(ConfigError, match=r"model\.quantize"):
        start(command(tmp_path / "other", base, reward, "int8"))


def test_the_reference_is_held_as_in_training_and_the_policy_is_plain(trained: tuple[Path, str, str]) -> None:
    """So the KL of an evaluation is that of the run."""
    run, base, _ = trained
    roles = load_inference_roles(model_settings(base, quantize="nf4"), tokenizer(), str(run / "model"), base)
    assert [quantized_as(roles.models[role]) for role in ("policy", "reference")] == [None, "nf4"]
