"""The SFT loss against `F.cross_entropy`, and what of the model it trains and writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, get_constant_schedule

from src.data.modules import TextData
from src.models.settings import LoraSettings
from src.modules.sft import SFTModule
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    LORA,
    TEXTS,
    Recorder,
    TinyCorpus,
    model_settings,
    snapshot,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS


def make(path: str, lora: LoraSettings | None, lr: float = 0.0) -> SFTModule:
    return SFTModule(
        model_settings(path), lora, tokenizer(), optimizer=partial(torch.optim.SGD, lr=lr),
        lr_schedule=get_constant_schedule, max_grad_norm=1e9, seed=1,
    )  # fmt: skip


def data(batch_size: int = 6, steps: int = 2, max_tokens: int = 9) -> TextData:
    return TextData(
        TinyCorpus(), tokenizer(), batch_size=batch_size, steps=steps, eval_rows=6, max_tokens=max_tokens, seed=1
    )


def run(module: SFTModule, tmp_path: Path, what: str = "fit", steps: int = 2, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        **({"devices": 1} | options), accelerator="cpu", max_epochs=1, log_every_n_steps=1, num_sanity_val_steps=0,
        logger=[recorder], enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    if what == "fit":
        trainer.fit(module, datamodule=data(steps=steps))
    else:
        trainer.test(module, datamodule=data(batch_size=4), verbose=False)
    return recorder


def plain_nats(model: Any, max_tokens: int = 9) -> torch.Tensor:
    """Of each predicted token of each text and its end token, unpadded, cut to `max_tokens`."""
    nats = []
    for text in TEXTS:
        ids = torch.tensor([*tokenizer()(text)["input_ids"], EOS][:max_tokens])
        logits = model(input_ids=ids.unsqueeze(0)).logits[0]
        nats.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    return torch.cat(nats)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_loss_is_the_cross_entropy_per_token(lora: LoraSettings | None, tmp_path: Path) -> None:
    """Checklist 56, 7. A batch that holds each text once; with a fresh adapter the model is the folder's own."""
    path = write_lm(tmp_path / "base")
    expected = plain_nats(AutoModelForCausalLM.from_pretrained(path).eval()).mean().item()
    logged = run(make(path, lora), tmp_path).by_step()
    assert [logged[i]["sft/loss"] for i in (1, 2)] == pytest.approx([expected] * 2, abs=1e-5)
    assert max(row.get("sft/val_loss", 0.0) for row in logged.values()) == pytest.approx(expected, abs=1e-5)


def test_the_test_figure_counts_every_held_out_token_once(tmp_path: Path) -> None:
    """Checklist 56. Over two ragged batches."""
    path = write_lm(tmp_path / "base")
    module = make(path, None)
    run(module, tmp_path, "test")
    figure, expected = module.result()["sft"]["nll_per_token"], plain_nats(AutoModelForCausalLM.from_pretrained(path))
    assert figure.n == len(expected)
    assert figure.value == pytest.approx(expected.mean().item(), abs=1e-5)
    assert figure.interval is not None
    assert figure.interval[0] < figure.value < figure.interval[1]


def test_a_step_follows_the_gradient_of_the_plain_loss(tmp_path: Path) -> None:
    """Checklist 56, 50. All weights are trained; the logged norm is that of the whole gradient."""
    path = write_lm(tmp_path / "base")
    module = make(path, None, lr=0.01)
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    plain_nats(plain).mean().backward()
    before = snapshot(list(module.net.parameters()))
    gradients = [p.grad for p in plain.parameters()]
    logged = run(module, tmp_path, steps=1).by_step()
    for old, new, gradient in zip(before, module.net.parameters(), gradients, strict=True):
        torch.testing.assert_close(old - new.detach(), 0.01 * gradient, atol=1e-6, rtol=1e-4)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert logged[1]["sft/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_an_adapter_is_merged_into_the_folder_and_the_base_is_frozen(tmp_path: Path) -> None:
    """Checklist 65, 59."""
    path = write_lm(tmp_path / "base")
    module = make(path, LORA, lr=0.5)
    frozen = {n: p.detach().clone() for n, p in module.net.named_parameters() if not p.requires_grad}
    assert len(frozen) > 20
    assert all(("lora_" in n) == p.requires_grad for n, p in module.net.named_parameters())
    run(module, tmp_path)
    assert all(torch.equal(p, frozen[n]) for n, p in module.net.named_parameters() if n in frozen)
    ids = torch.tensor([[4, 5, 6, 7]])
    module.eval()
    with torch.no_grad():
        expected = module.net(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(module.save(tmp_path / "run")).eval()(input_ids=ids).logits
        bare = AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    assert (merged - bare).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_loaded_model_drops_out_in_training_alone(lora: LoraSettings | None, tmp_path: Path) -> None:
    """As its configuration says; each step draws anew, though the weights stay."""
    path = write_lm(tmp_path / "base", embd_pdrop=0.5)
    expected = plain_nats(AutoModelForCausalLM.from_pretrained(path).eval()).mean().item()
    logged = run(make(path, lora), tmp_path).by_step()
    first, second = (logged[step]["sft/loss"] for step in (1, 2))
    assert min(abs(first - expected), abs(second - expected), abs(first - second)) > 1e-3
    assert max(row.get("sft/val_loss", 0.0) for row in logged.values()) == pytest.approx(expected, abs=1e-5)
