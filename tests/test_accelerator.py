"""No tensor is left behind on the CPU when a run is on a GPU. There is none here: it is pretended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

import src.callbacks.rollout
import src.evaluate.prompts
import src.rollout.evaluation
import src.stages.base
from src.errors import ConfigError
from src.evaluate.__main__ import evaluate
from src.pipeline import run_pipeline
from src.rollout.replay import Block
from src.runs.start import start as run
from src.utils.device import accelerator, device
from src.utils.seeding import generator
from tests.accelerator import CPU, GPU, OnPretendedGPU, PretendedGPU, where
from tests.conftest import TINY_RUN
from tests.tiny import FOREIGN_WARNINGS, write_lm

pytestmark = FOREIGN_WARNINGS


class OnGPU(Trainer):
    """Lightning's Trainer on a GPU that is pretended."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"accelerator": "auto", "strategy": OnPretendedGPU()})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices that random streams were asked for; there is no generator of a GPU without one."""
    asked: list[torch.device] = []

    def of_cpu(*key: Any, device: torch.device | str = "cpu") -> torch.Generator:
        asked.append(torch.device(device))
        return generator(*key)

    monkeypatch.setattr(src.callbacks.rollout, "generator", of_cpu)
    monkeypatch.setattr(src.rollout.evaluation, "generator", of_cpu)
    monkeypatch.setattr(src.stages.base, "Trainer", OnGPU)
    monkeypatch.setattr(Block, "_replay", Block._step)  # nothing can be captured without a GPU
    with PretendedGPU():
        yield asked


@pytest.mark.parametrize(("cuda", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_a_cuda_gpu_is_taken_where_there_is_one_and_never_apples(
    cuda: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac `gpu` would be Apple's, and so would Lightning's own `auto`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: not cuda)
    assert accelerator("auto") == device().type == chosen
    assert accelerator("cpu") == "cpu"
    for apple in ("mps", "gpu"):
        if cuda and apple == "gpu":
            assert accelerator(apple) == "gpu"
            continue
        with pytest.raises(ConfigError, match=f"trainer.accelerator={apple}: Apple's GPUs have no float64"):
            accelerator(apple)


def test_what_meets_on_two_devices_is_refused(gpu: list[torch.device]) -> None:
    """And numbers, indices from the CPU and moved tensors are not: otherwise the runs below would show nothing."""
    there, here = torch.ones(3, device=GPU), torch.ones(3)
    assert (there * 2).device == there.relu().device == torch.zeros_like(there).device == GPU
    assert there.cpu().device == here.device == CPU
    assert where(there + torch.tensor(1.0)) == where(there[torch.tensor([0])]) == where(there + here.to(GPU)) == GPU
    for mixed in (
        lambda: there + here,
        lambda: torch.where(there > 0, there, here),
        lambda: here[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda: there.__setitem__(0, here),
        lambda: torch.cat([there, here]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()


@pytest.mark.parametrize(
    "overrides",
    [
        "model.lora.layers=1",
        "model.lora=null model.gradient_checkpointing=true ppo.ptx_coef=0.5",
        "advantage=rloo rollout.samples_per_prompt=4 kl=loss kl_estimator=exact",
        "advantage=remax policy_loss=kl_penalty ppo.epochs=2 old_kl=exact score_scaling=normalize",
        "policy_loss=trpo preset=ppo_max",
    ],
)
def test_a_whole_run_stays_on_its_device(overrides: str, tmp_path: Any, gpu: list[torch.device]) -> None:
    """Sampling, scoring, learning, checkpoint, evaluation and saving."""
    chosen = overrides.split()
    plain = [
        o for o in TINY_RUN if not o.startswith(("trainer.accelerator", *(["model.lora."] * ("null" in overrides))))
    ]
    folder = write_lm(tmp_path / "base")
    result = run([*plain, *chosen, f"model.path={folder}", f"log_dir={tmp_path}", "name=there"])
    assert set(gpu) == {GPU}
    assert isinstance(result["ppo"], dict)
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert all(isinstance(tensor, Tensor) for tensor in saved["state_dict"].values())


@pytest.mark.slow
def test_all_stages_stay_on_it(tmp_path: Any, gpu: list[torch.device]) -> None:
    """SFT, a reward model on the base, its normalization, and PPO with the reward as a role."""
    small = "experiment=quick trainer.accelerator=cpu sft.steps=2 sft.eval_rows=8 reward_model.steps=2"
    smaller = "ppo.num_iterations=1 reward_model.normalization_samples=8 ppo.eval_prompts=4 ppo.epochs=1"
    on_base = "reward_net=adapter reward=adapter"
    result = run_pipeline([*small.split(), *smaller.split(), *on_base.split(), f"log_dir={tmp_path}", "name=there"])
    assert {"sft", "reward_model", "ppo"} <= set(result)
    assert set(gpu) == {GPU}


def test_an_evaluation_stays_on_it(
    tiny_run: Any, tmp_path: Any, gpu: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both judges, policy and reference; the figures are those of the CPU, whose faster operators round otherwise."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the film"}\n{"prompt": "we liked"}\n', encoding="utf-8")
    on_cpu = evaluate(str(tiny_run[0]), [f"prompts={prompts}", f"out={tmp_path}/cpu"])
    monkeypatch.setattr(src.evaluate.prompts, "device", lambda: GPU)
    gpu.clear()
    there = evaluate(str(tiny_run[0]), [f"prompts={prompts}", f"out={tmp_path}/gpu"])
    assert set(gpu) == {GPU}
    rows, wanted = (
        [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (there, on_cpu)
    )
    assert len(rows) == len(wanted) > 0
    for row, other in zip(rows, wanted, strict=True):
        assert row == {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in other.items()}
