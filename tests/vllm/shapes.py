"""Small models that vLLM can serve on a CPU (its attention there has no heads smaller than 32), and PPO on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from src.models.roles import Roles, build_roles
from src.rollout import experience
from src.rollout.answering import Responses, as_rollout
from src.rollout.sampler_check import require_agreement
from src.runs.start import start
from src.types import Prompts, Rollout
from tests.families import write_family
from tests.tiny import model_settings, plain_logprobs, plain_model, rows_of

FAMILIES = {
    "gpt2": ("gpt2", {"n_embd": 64}),  # two heads of 32, tied
    "qwen2": ("qwen2.5-0.5b-instruct", {"hidden_size": 64}),  # two heads of 32 on one of keys and values, tied
}


def write(folder: Path, shape: str) -> str:
    family, sizes = FAMILIES[shape]
    return write_family(folder / shape, family, **sizes)


def whole_models(path: str) -> Roles:
    """Every weight is trained, the tied embedding too."""
    return build_roles(model_settings(path, lora=None), seed=5)


def random_prompts(lengths: list[int]) -> Prompts:
    draws, width = torch.Generator().manual_seed(0), max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(5, 250, mask.shape, generator=draws).where(mask, 0)
    rows = torch.arange(len(lengths))
    return Prompts(ids=ids, mask=mask, index=rows, group_ids=rows, texts=("",) * len(rows), metadata=({},) * len(rows))


def largest_difference(roles: Roles, prompts: Prompts, responses: Responses, temperature: float) -> float:
    """In nats, between the engine's log-probabilities and those of a plain copy of the policy, row by row."""
    expected = plain_logprobs(plain_model(roles, "policy"), as_rollout(roles, prompts, responses, 0), temperature)
    given = rows_of(responses[2], responses[1])
    assert [len(row) for row in given] == [len(row) for row in expected]
    return max(abs(a - b) for one, other in zip(given, expected, strict=True) for a, b in zip(one, other, strict=True))


class Synchronizations:
    """Of each batch of a run, how far engine and training were apart, and the policy's embedding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.differences: list[float] = []
        self.embeddings: list[torch.Tensor] = []
        monkeypatch.setattr(experience, "require_agreement", self.compare)

    def compare(self, roles: Roles, rollout: Rollout, logprobs: torch.Tensor, *given: Any) -> None:
        apart = (rollout.behavior_logprobs - logprobs)[rollout.response_mask]
        self.differences.append(apart.abs().max().item())
        with roles.acting("policy") as lm:
            self.embeddings.append(lm.get_input_embeddings().weight.detach().clone())
        require_agreement(roles, rollout, logprobs, *given)


def ppo(shape: str, base: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """A PPO run of three iterations, with a check of the engine in each."""
    return start(
        [
            *("experiment=quick", f"model={FAMILIES[shape][0]}", f"model.path={base}", "reward=vader"),
            *("trainer.accelerator=cpu", f"log_dir={folder}", "name=vllm", "data.n_pairs=10", "rollout.check_every=1"),
            *("ppo.num_iterations=3", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.epochs=1", "ppo.lr=0.01"),
            *("ppo.eval_prompts=6", "rollout.max_prompt_tokens=8", "rollout.max_new_tokens=6"),
            *("rollout.temperature=0.9", *overrides),
        ]
    )
