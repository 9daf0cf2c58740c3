"""bf16-mixed is bfloat16 where the arithmetic is, and float32 where the sums are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from src.models.distribution import TokenDistribution
from src.models.forward import at_actions, hidden_states, whole_sequence
from tests.tiny import FOREIGN_WARNINGS, fit, make_maker, make_module, make_roles, ragged_rollout, write_lm

pytestmark = FOREIGN_WARNINGS


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_activations_have_the_precision_that_was_asked_for(
    base_dtype: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's products in rollout, scoring and update; logprobs, entropies and trained weights in float32."""
    roles = make_roles(write_lm(tmp_path / "base"), dtype=base_dtype)
    activations: set[torch.dtype] = set()
    read: set[torch.dtype] = set()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        activations.add(output.dtype)

    layers = [m for name, m in roles.peft.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lora_" not in name]
    assert len(layers) >= 8
    for layer in layers:
        layer.register_forward_hook(note)
    plain = TokenDistribution.logprobs_and_entropy

    def noted(self: TokenDistribution, entropy_trains: bool = True) -> tuple[Tensor, Tensor]:
        found = plain(self, entropy_trains)
        read.update(x.dtype for x in found)
        return found

    monkeypatch.setattr(TokenDistribution, "logprobs_and_entropy", noted)
    fit(make_module(roles), tmp_path / "run", maker=make_maker(), iterations=1, precision=precision)
    half = precision == "bf16-mixed" or base_dtype == "bfloat16"
    assert activations == {torch.bfloat16 if half else torch.float32}
    assert read == {torch.float32}
    assert {p.dtype for p in [*roles.policy_parameters(), *roles.critic_parameters()]} == {torch.float32}


def test_values_and_scores_on_the_base_keep_the_precision_of_their_heads(tmp_path: Path) -> None:
    """Of the states that autocast computed in bfloat16, the heads' sums are those in float32."""
    roles, rollout = make_roles(write_lm(tmp_path / "base"), spread=0.2), ragged_rollout()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        values = roles.values(rollout)
        with roles.acting("critic") as lm:
            states = at_actions(hidden_states(lm, *whole_sequence(rollout)), rollout)
    assert roles.value_head is not None
    with torch.no_grad():
        expected = roles.value_head(states.float()).squeeze(-1)
    assert values.dtype == torch.float32
    assert torch.equal(values[rollout.response_mask], expected[rollout.response_mask])
    assert not torch.equal(values, values.bfloat16().float())
