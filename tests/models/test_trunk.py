"""The layers below all adapters, computed once: the same numbers and gradients as with the whole model every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from src.errors import ModelError, SettingError
from src.models.forward import backbone_states, hidden_states, whole_sequence
from src.models.loading import load_causal_lm
from src.models.roles import Roles
from src.models.settings import LoraSettings
from src.models.trunk import split
from src.rollout.minibatches import micro_batches
from src.types import Rollout
from tests.models import architectures
from tests.tiny import FOREIGN_WARNINGS, LORA, make_maker, make_prompts, make_roles, model_settings, ragged_rollout

pytestmark = FOREIGN_WARNINGS

TOP = replace(LORA, layers=1)  # of two layers
CRITIC = replace(LORA, critic_layers=1)
SHARING = [TOP, replace(LORA, layers=2), CRITIC]
families = pytest.mark.parametrize("family", architectures.DECODERS)


def roles_of(folder: Path, family: str, lora: object = TOP, **options: object) -> Roles:
    return make_roles(architectures.write(folder, family), lora, spread=0.3, dtype="float64", **options)


def kept(roles: Roles, rollout: Rollout) -> Rollout:
    return replace(rollout, trunk=roles.trunk(rollout))


@families
def test_the_two_parts_in_turn_are_the_whole(family: str, tmp_path: Path) -> None:
    """For each split of the layers, ragged and padded on both sides."""
    lm = load_causal_lm(model_settings(architectures.write(tmp_path, family), dtype="float64"))
    ids, mask = whole_sequence(ragged_rollout())
    expected = hidden_states(lm, ids, mask)
    for top in (1, 2):
        lower, upper = split(lm, top)
        below = backbone_states(lower, mask, input_ids=ids)
        assert_close(backbone_states(upper, mask, inputs_embeds=below)[mask], expected[mask], atol=1e-10, rtol=0)
    assert_close(hidden_states(lm, ids, mask), expected, atol=0, rtol=0)


@families
def test_only_the_top_layers_have_adapters(family: str, tmp_path: Path) -> None:
    roles = roles_of(tmp_path, family)
    adapted = {name.split(".lora_")[0] for name, p in roles.named_parameters() if p.requires_grad and "lora_" in name}
    assert adapted
    assert all(".1." in name for name in adapted)


@families
@pytest.mark.parametrize("layers", [1, 2], ids=["top", "all"])
@pytest.mark.parametrize("critic", [True, False], ids=["critic", "alone"])
def test_each_role_adapts_every_linear_layer_of_the_top_layers_once(
    family: str, layers: int, critic: bool, tmp_path: Path
) -> None:
    """Each adapter that is put on finds the layers of the plain model, however many are there already."""
    roles = roles_of(tmp_path, family, replace(LORA, layers=layers), critic=critic)
    plain = load_causal_lm(model_settings(str(tmp_path)))
    linear = [name for name, module in plain.base_model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    expected = {n for n in linear if any(part in map(str, range(2 - layers, 2)) for part in n.split("."))}
    assert len(expected) == layers * len(linear) / 2 > 0
    prefix = f"peft.base_model.model.{plain.base_model_prefix}."
    for role in ("policy", "critic"):
        found = [name for name, _ in roles.named_parameters() if f".lora_A.{role}." in name]
        names = [name.removeprefix(prefix).removesuffix(f".lora_A.{role}.weight") for name in found]
        assert sorted(names) == (sorted(expected) if critic or role == "policy" else [])


@families
@pytest.mark.parametrize("lora", SHARING, ids=["top", "all", "critic"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_role_gives_the_same_numbers_and_gradients(
    family: str, lora: LoraSettings, checkpointing: bool, tmp_path: Path
) -> None:
    """Micro-batch by micro-batch, each trimmed to its own lengths, as an update reads them."""
    roles = roles_of(tmp_path, family, lora, gradient_checkpointing=checkpointing)
    rollout = ragged_rollout()
    parameters = [*roles.policy_parameters(), *roles.critic_parameters()]

    def everything(whole: Rollout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        numbers, gradients = [], [torch.zeros_like(p) for p in parameters]
        for _, micro in micro_batches(whole, 3):
            for role in ("policy", "reference"):
                numbers.append(roles.distribution(micro, 0.8, role).logprobs().detach())
            for make in (lambda r: roles.distribution(r, 0.8).logprobs(), roles.values):
                result = make(micro)
                numbers.append(result.detach())
                found = torch.autograd.grad(result.square().sum(), parameters, allow_unused=True)
                gradients = [a if b is None else a + b for a, b in zip(gradients, found, strict=True)]
        return numbers, gradients

    plain, through = everything(rollout), everything(kept(roles, rollout))
    assert_close(through, plain, atol=1e-10, rtol=0)
    assert all(gradient.abs().max() > 1e-6 for gradient in plain[1])


def test_an_experience_keeps_it_for_the_update(tmp_path: Path) -> None:
    """Every row's own, whatever micro-batch it was computed in; a model with adapters everywhere keeps nothing."""
    for lora, is_kept in ((TOP, True), (CRITIC, True), (LORA, False)):
        roles = roles_of(tmp_path / str(lora.critic_layers) / str(is_kept), "gpt2", lora)
        rollout = ragged_rollout()
        found = make_maker(batch_size=2).with_trunk(roles, rollout).trunk
        if not is_kept:
            assert found is None
            continue
        mask = whole_sequence(rollout)[1]
        expected = roles.trunk(rollout)
        assert found is not None
        assert_close(found[mask], expected[mask], atol=1e-10, rtol=0)
        draws = torch.Generator().manual_seed(0)
        prompts = make_prompts(["the film", "a book was"])
        made = make_maker().sample(roles, "policy", prompts, 0, draws)
        assert made.trunk is None


@families
def test_the_critic_of_the_top_layers_is_not_run_below_and_the_policy_is(family: str, tmp_path: Path) -> None:
    """The critic's adapter is in the top layer, the policy's in both; what the critic reads does not move with it."""
    roles = roles_of(tmp_path, family, CRITIC)
    names = {role: [n for n, _ in roles.named_parameters() if f".{role}." in n] for role in ("policy", "critic")}
    assert names["critic"]
    assert all(".1." in name for name in names["critic"])
    assert {name.replace(".policy.", ".critic.") for name in names["policy"]} > set(names["critic"])
    rollout = ragged_rollout()
    before, values = kept(roles, rollout), roles.values(kept(roles, rollout))
    with torch.no_grad():
        for parameter in roles.policy_parameters():
            parameter.add_(0.1)
    assert_close(roles.trunk(rollout), before.trunk, atol=0, rtol=0)
    assert_close(roles.values(before), values, atol=0, rtol=0)
    without = roles_of(tmp_path, family, CRITIC, critic=False)
    assert not without.shares_trunk


def test_a_trunk_for_critic_and_another_for_all_are_refused() -> None:
    """One is kept; the same number says nothing new."""
    assert replace(LORA, layers=1, critic_layers=1).shared_above == 1
    with pytest.raises(SettingError, match="critic_layers must be null or 2"):
        replace(LORA, layers=2, critic_layers=1)
    with pytest.raises(SettingError, match="critic_layers must be at least 1"):
        replace(LORA, critic_layers=0)


def test_more_layers_than_there_are_and_unknown_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.layers=3: the model has 2 layers"):
        roles_of(tmp_path / "a", "gpt2", replace(LORA, layers=3))
    with pytest.raises(ModelError, match=r"model\.lora\.critic_layers=3: the model has 2 layers"):
        roles_of(tmp_path / "c", "gpt2", replace(LORA, critic_layers=3))
    lm = load_causal_lm(model_settings(architectures.write(tmp_path / "b", "gpt2")))
    lm.config.model_type = "mamba"
    with pytest.raises(ModelError, match="mamba"):
        split(lm, 1)
