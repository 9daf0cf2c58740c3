"""`PPOModule.load_from_checkpoint`: the weights of the run that wrote the checkpoint, on roles that are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from src.errors import ModelError
from src.models.roles import build_roles
from src.models.settings import LoraSettings, ModelSettings
from src.modules.ppo import PPOModule
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    PROMPTS,
    ScriptedReward,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=[LORA, None], ids=["lora", "full"])
def trained(request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A module after two iterations, and the checkpoint that its trainer wrote."""
    folder, module = tmp_path_factory.mktemp("run"), make_module(make_roles(base, request.param))
    _, trainer = fit(module, folder, maker=make_maker())
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt", request.param


def test_it_has_the_weights_and_counters_of_the_run(trained: tuple, base: str) -> None:
    """On fresh roles, that differ from the trained ones until then: all trained tensors, and what the policy writes."""
    module, path, lora = trained
    fresh = make_roles(base, lora)
    before = [p.detach().clone() for p in fresh.policy_parameters()]
    loaded = PPOModule.load_from_checkpoint(path, roles=fresh, reward=ScriptedReward())
    mine = [*loaded.roles.policy_parameters(), *loaded.roles.critic_parameters()]
    theirs = [*module.roles.policy_parameters(), *module.roles.critic_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(mine, before, strict=False))
    assert (loaded.episodes, loaded.tokens) == (module.episodes, module.tokens) == (16, module.tokens)
    answers = [make_maker().sample(m.roles, "policy", make_prompts(PROMPTS), 0, None) for m in (loaded, module)]
    assert answers[0].responses == answers[1].responses


def test_it_can_be_trained_on(trained: tuple, base: str, tmp_path: Path) -> None:
    """From where the checkpoint ended: the first rollout is that of the trained policy."""
    module, path, lora = trained
    loaded = PPOModule.load_from_checkpoint(path, roles=make_roles(base, lora), reward=ScriptedReward())
    before = [p.detach().clone() for p in loaded.roles.policy_parameters()]
    fit(loaded, tmp_path, maker=make_maker(), iterations=1)
    assert any(not torch.equal(a, b) for a, b in zip(loaded.roles.policy_parameters(), before, strict=True))
    assert loaded.episodes > module.episodes


def test_a_checkpoint_of_a_run_from_the_command_line(tiny_run: tuple[Path, str]) -> None:
    """The policy is the model that the run has exported."""
    folder, base = tiny_run
    roles = build_roles(ModelSettings(path=base, lora=LoraSettings(rank=2)))
    module = PPOModule.load_from_checkpoint(
        folder / "checkpoints" / "iteration-2.ckpt", roles=roles, reward=ScriptedReward()
    )
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        assert_close(module.roles.merged_policy()(input_ids=ids).logits, exported(input_ids=ids).logits)
        assert not torch.allclose(roles.peft.unload()(input_ids=ids).logits, exported(input_ids=ids).logits)


def test_a_checkpoint_of_another_model_is_refused(trained: tuple, base: str, tmp_path: Path) -> None:
    """Other weights in the base, other shapes, another rank, and adapters for whole models."""
    _, path, lora = trained
    other_rank = make_roles(base, LoraSettings(rank=1)) if lora else None
    refused = {
        "other frozen weights": make_roles(write_lm(tmp_path / "other", seed=1), lora),
        r"is \(.*\) in it and": make_roles(write_lm(tmp_path / "wider", n_embd=32), lora),
        "missing": make_roles(base, None if lora else LORA),
        "does not fit": make_roles(base, lora, critic=False),
    } | ({"LoRA|lora_": other_rank} if other_rank else {})
    for message, roles in refused.items():
        with pytest.raises(ModelError, match=message):
            PPOModule.load_from_checkpoint(path, roles=roles, reward=ScriptedReward())
