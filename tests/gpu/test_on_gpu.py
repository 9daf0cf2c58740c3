"""What only a CUDA GPU can show: the same numbers as a CPU, replayed decoding, whole runs and their resumption."""

from __future__ import annotations

import copy
import csv
import math
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from src.core.logprobs import entropy_from_logits, logprobs_from_logits
from src.core.padding import pad_left
from src.kernels.norm import FusedLlamaNorm, FusedQwen2Norm
from src.models.loading import load_causal_lm, load_tokenizer
from src.models.settings import LoraSettings
from src.models.vocab_head import head_logprobs
from src.rollout import sampling
from src.rollout.replay import Block
from src.rollout.sampling import Sampler
from tests.conftest import TINY_RUN
from tests.families import TEXTS, write_family
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    LORA,
    Inject,
    fit,
    make_module,
    make_roles,
    model_settings,
    ragged_experience,
    ragged_rollout,
    snapshot,
    write_lm,
)

pytestmark = [*FOREIGN_WARNINGS, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GPU, ROOT = "cuda", Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """float32 products in float32, as on a CPU."""
    torch.set_float32_matmul_precision("highest")


def moved(x: Any) -> Any:
    """A record with all its tensors on the GPU."""
    if isinstance(x, Tensor):
        return x.to(GPU)
    if is_dataclass(x):
        return replace(cast(Any, x), **{field.name: moved(getattr(x, field.name)) for field in fields(x)})
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "pythia-160m", "llama-3.2-1b-instruct", "qwen2.5-0.5b-instruct"])
def test_replayed_steps_draw_with_the_logprobs_of_whole_forwards(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end early among them; in blocks of a few steps, and every step but a block's first from a graph."""
    folder = write_family(tmp_path, family)
    lm = load_causal_lm(model_settings(folder, dtype=dtype)).to(GPU)
    stop = torch.arange(0, lm.config.vocab_size, 12, device=GPU)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])
    monkeypatch.setattr(sampling, "STEPS", 5)
    monkeypatch.setattr(sampling, "ASKED", 3)
    prompts = load_tokenizer(folder)([text[: 10 + 9 * i] for i, text in enumerate(TEXTS)])["input_ids"] * 8
    ids, mask = (x.to(GPU) for x in pad_left(prompts, 0))
    drawn = Sampler(12).sample(lm, ids, mask, stop, 0, torch.Generator(GPU).manual_seed(0))
    assert 4 <= len(replays) <= 8  # 11 steps after the first, in blocks of 5, 5 and 1
    assert drawn[3].any()
    assert not drawn[3].all()
    exact = AutoModelForCausalLM.from_pretrained(folder).to(GPU, torch.float64)
    for prompt, response, counted, logprobs in zip(prompts, *drawn[:3], strict=True):
        whole = torch.tensor([[*prompt, *response[counted].tolist()]], device=GPU)
        with torch.no_grad():
            expected = exact(input_ids=whole).logits[0].log_softmax(-1)[:-1].gather(1, whole[0, 1:, None]).squeeze(1)
        tolerance = 1e-4 if dtype == "float32" else 0.15
        assert_close(logprobs[counted].double(), expected[len(prompt) - 1 :], atol=tolerance, rtol=0)


def test_replayed_greedy_tokens_are_those_of_a_cpu(tmp_path: Path) -> None:
    folder = write_lm(tmp_path, n_positions=256)
    lm = load_causal_lm(model_settings(folder))
    ids, mask = pad_left([[5, 6, 7], [8, 9], [10]], 0)
    stop = torch.tensor([EOS])
    expected = Sampler(200).sample(lm, ids, mask, stop, 0, None)
    found = Sampler(200).sample(lm.to(GPU), ids.to(GPU), mask.to(GPU), stop.to(GPU), 0, None)
    assert torch.equal(found[0].cpu(), expected[0])
    assert_close(found[2].cpu(), expected[2], atol=1e-4, rtol=0)


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    """PyTorch raises on every call that does."""
    lm = load_causal_lm(model_settings(write_lm(tmp_path))).to(GPU)
    ids, mask = (x.to(GPU) for x in pad_left([[5, 6, 7], [8, 9]], 0))
    seen = 0

    def watched(self: Block, u: Tensor | None, step: Any = Block.step) -> tuple[Tensor, Tensor]:
        nonlocal seen
        seen += 1
        if self._graph is None:
            return step(self, u)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, u)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "step", watched)
        Sampler(12).sample(lm, ids, mask, torch.tensor([-1], device=GPU), 0, torch.Generator(GPU).manual_seed(0))
    assert seen == 11


@pytest.mark.parametrize("frozen", [True, False])
def test_the_head_gives_the_numbers_and_gradients_of_the_plain_path(frozen: bool) -> None:
    """In float64; more words than are held at a time."""
    hidden = torch.randn(300, 16, dtype=torch.float64, device=GPU, requires_grad=True)
    head = nn.Linear(16, 60_000, bias=False, dtype=torch.float64, device=GPU).requires_grad_(not frozen)
    ids, weights = torch.randint(60_000, (300,), device=GPU), torch.randn(2, 300, device=GPU)

    def gradients(logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
        of = [hidden] if frozen else [hidden, head.weight]
        return list(torch.autograd.grad((weights[0] * logprobs + weights[1] * entropy).sum(), of))

    found = head_logprobs(hidden, head.weight, None, ids, 0.7, True)
    logits = head(hidden)
    expected = logprobs_from_logits(logits, ids, 0.7), entropy_from_logits(logits, 0.7)
    assert_close(found, expected, atol=1e-9, rtol=0)
    assert_close(gradients(*found), gradients(*expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["llama-3.2-1b-instruct", "qwen2.5-0.5b-instruct"])
def test_fused_norms_give_the_numbers_of_the_plain_ones(family: str, tmp_path: Path) -> None:
    """On random states with weights that are not 1; the plain ones run in float64."""
    lm = load_causal_lm(model_settings(write_family(tmp_path, family), dtype="bfloat16")).to(GPU)
    norms = [module for module in lm.modules() if isinstance(module, FusedLlamaNorm | FusedQwen2Norm)]
    assert len(norms) == 5
    x = torch.randn(3, 7, lm.config.hidden_size, dtype=torch.bfloat16, device=GPU)
    with torch.no_grad():
        norms[0].weight.normal_(1, 0.2)
        found = norms[0](x).double()
        exact = copy.deepcopy(norms[0]).double().cpu()(x.double().cpu()).to(GPU)
    assert_close(found, exact, atol=0, rtol=2**-8)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "every weight"])
def test_an_iteration_learns_the_same_as_on_a_cpu(lora: LoraSettings | None, tmp_path: Path) -> None:
    """The same experience in float32: after two epochs of two minibatches every trained number agrees."""
    base = write_lm(tmp_path / "base")
    learned = []
    for device in ("cpu", "gpu"):
        roles = make_roles(base, lora, spread=0.05)
        rollout = ragged_rollout()
        with torch.no_grad():
            old, values = roles.distribution(rollout, 1.0).logprobs(), roles.values(rollout)
        experience = ragged_experience(rollout, old + 0.1, values)
        module = make_module(roles)
        before = snapshot([*roles.policy_parameters(), *roles.critic_parameters()])
        experience = moved(experience) if device == "gpu" else experience
        fit(module, tmp_path / device, iterations=1, callbacks=(Inject(experience),), accelerator=device)
        after = [*roles.policy_parameters(), *roles.critic_parameters()]
        learned.append([(now.detach().cpu() - then.cpu()) for now, then in zip(after, before, strict=True)])
    assert max(float(change.abs().max()) for change in learned[0]) > 0.01
    moved_by = [torch.cat([change.flatten() for change in changes]) for changes in learned]
    assert (
        float((moved_by[0] - moved_by[1]).norm() / moved_by[0].norm()) < 1e-2
    )  # Adam divides tiny gradients by themselves


def train(*overrides: str) -> None:
    """`python -m src.train` on the tiny model, on the GPU."""
    command = [sys.executable, "-m", "src.train", *TINY_RUN, "trainer.accelerator=gpu", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_whole_run_starts_at_the_reference_and_resumes(half: bool, tmp_path: Path) -> None:
    """The first KL is 0, and a run that resumes after the first iteration repeats the second."""
    base = write_lm(tmp_path / "base")
    given = [f"model.path={base}", f"log_dir={tmp_path}"]
    given += ["model.dtype=bfloat16", "trainer.precision=bf16-mixed"] if half else []
    train(*given, "name=whole")
    first, second = rows(tmp_path / "ppo/whole")[:2]
    assert abs(float(first["rollout/kl"])) < 1e-6
    assert all(math.isfinite(float(number)) for number in second.values() if number)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo/whole/model")
    train(*given, "name=again", f"resume={tmp_path}/ppo/whole/checkpoints/iteration-1.ckpt")
    again = rows(tmp_path / "ppo/again")[-1]
    assert again["step"] == second["step"]
    for name in ("rollout/score", "rollout/response_length", "rollout/nll_per_token", "policy/lr", "train/tokens"):
        assert float(again[name]) == pytest.approx(float(second[name]), rel=0.05 if half else 1e-3, abs=1e-3), name
