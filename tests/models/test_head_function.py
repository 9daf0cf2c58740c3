"""Logits that are scaled or capped after the head: numbers and gradients of what the model itself computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from src.core.logprobs import entropy_from_logits, logprobs_from_logits
from src.models import distribution, head_function
from src.models.head_function import HeadFunction, function_of, logits
from src.models.vocab_head import token_logprobs
from src.rollout.sampling import Sampler
from tests.matrix.architectures import write
from tests.tiny import (
    FOREIGN_WARNINGS,
    assert_rows_close,
    make_maker,
    make_prompts,
    make_roles,
    plain_logprobs,
    plain_model,
    rows_of,
)

pytestmark = FOREIGN_WARNINGS

# what the modeling files of transformers do with the key of config.json
FUNCTIONS = {
    "cohere": ({"logit_scale": 0.5}, HeadFunction(scale=0.5)),
    "granite": ({"logits_scaling": 4.0}, HeadFunction(scale=0.25)),
    "falcon_h1": ({"lm_head_multiplier": 0.5}, HeadFunction(scale=0.5)),
    "gemma2": ({"final_logit_softcapping": 1.5}, HeadFunction(cap=1.5)),
    "nanochat": ({"final_logit_softcapping": 1.5}, HeadFunction(cap=1.5)),
    "llama": ({}, HeadFunction()),
}


def test_logits_are_scaled_and_then_capped() -> None:
    """Derived: 3 tanh(2 z / 3) at z = 0, 1.5, and far away."""
    found = HeadFunction(scale=2.0, cap=3.0)(torch.tensor([0.0, 1.5, 1e4], dtype=torch.float64))
    assert_close(found, torch.tensor([0.0, 3 * torch.tanh(torch.tensor(1.0)).item(), 3.0], dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_function_of_an_architecture_is_found_and_used(name: str, tmp_path: Path) -> None:
    """Checklist 1, 15. Reference: each row alone through the model's own forward, after sampling with its cache."""
    changes, expected = FUNCTIONS[name]
    path = write(tmp_path, name, **changes)
    roles = make_roles(path, spread=0.2)
    with roles.acting("policy") as lm:
        assert function_of(lm.get_output_embeddings()) == expected
    maker = make_maker(sampler=Sampler(max_new_tokens=6, temperature=0.7))
    rollout = maker.sample(roles, "policy", make_prompts(["the film was", "good"]), 0, torch.Generator().manual_seed(1))
    found = roles.distribution(rollout, 0.7).logprobs().detach()
    reference = plain_logprobs(plain_model(roles, "policy"), rollout, 0.7)
    assert_rows_close(rows_of(found, rollout.response_mask), reference, 1e-4)
    assert_rows_close(rows_of(rollout.behavior_logprobs, rollout.response_mask), reference, 1e-4)
    roles.merged_policy().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_rows_close(plain_logprobs(merged, rollout, 0.7), reference, 1e-4)


@pytest.mark.parametrize("function", [HeadFunction(scale=0.4), HeadFunction(0.4, 1.5)], ids=["scale", "cap"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_numbers_and_gradients_are_those_of_autograd(
    frozen: bool, function: HeadFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 14, 53. In chunks of two tokens, for hidden states and weights."""
    monkeypatch.setattr(head_function, "CHUNK", 2 * 11)
    monkeypatch.setattr(distribution, "CHUNK", 2 * 11)
    draws = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 11).double().requires_grad_(not frozen)
    head.function = function  # type: ignore[assignment]
    hidden = torch.randn(5, 6, dtype=torch.float64, generator=draws).requires_grad_(True)
    ids = torch.randint(0, 11, (5,), generator=draws)
    z = head(hidden) * function.scale
    z = z if function.cap is None else function.cap * torch.tanh(z / function.cap)
    assert_close(logits(head, hidden), z)
    expected = logprobs_from_logits(z, ids, 0.6), entropy_from_logits(z, 0.6)
    found = token_logprobs(head, hidden, ids, 0.6, entropy_trains=True)
    assert_close(found, expected)
    inputs = [hidden] if frozen else [hidden, *head.parameters()]
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * a + b).sum(), inputs) for a, b in (found, expected)]
    assert_close(*gradients)
