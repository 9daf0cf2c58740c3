"""A model whose layers use the faster product gives what it gave, is saved as it was and takes adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers.activations import NewGELUActivation

from src.models import layers
from src.models.layers import FusedGELU, Linear, TransposedLinear, with_fast_layers
from src.models.loading import load_causal_lm
from tests.models import architectures
from tests.tiny import FOREIGN_WARNINGS, make_roles, model_settings, ragged_rollout

pytestmark = FOREIGN_WARNINGS
families = pytest.mark.parametrize("family", architectures.DECODERS)


def test_the_activation_is_the_same_function() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert_close(FusedGELU()(x), NewGELUActivation()(x), atol=1e-12, rtol=0)


@families
def test_logits_and_saved_weights_stay(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_causal_lm(model_settings(architectures.write(tmp_path / "model", family)))
    monkeypatch.setattr(layers, "LARGE", 1)
    fast = with_fast_layers(copy.deepcopy(plain))
    assert any(isinstance(module, Linear | TransposedLinear) for module in fast.modules())
    assert not any(isinstance(module, Linear | TransposedLinear) for module in plain.modules())
    ids = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    assert_close(fast(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    fast.save_pretrained(tmp_path / "saved")
    again = load_causal_lm(model_settings(str(tmp_path / "saved")))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


@families
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradients_of_the_roles_stay(family: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rollout = architectures.write(tmp_path, family), ragged_rollout()
    found = []
    for large in (2**62, 1):
        monkeypatch.setattr(layers, "LARGE", large)
        roles = make_roles(path, spread=0.1) if lora else make_roles(path, None, spread=0.1)
        (roles.distribution(rollout, 1.0).logprobs().sum() + roles.values(rollout).sum()).backward()
        found.append([p.grad for p in [*roles.policy_parameters(), *roles.critic_parameters()] if p.grad is not None])
    scale = max(g.abs().max() for g in found[0])
    assert_close([g / scale for g in found[1]], [g / scale for g in found[0]], atol=1e-5, rtol=1e-4)
