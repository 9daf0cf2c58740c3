"""Four roles on one base: the reward adapter beside policy, critic and reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from src.checkpointing.checkpoint import IterationCheckpoint
from src.errors import ModelError, SettingError
from src.models.endings import endings
from src.models.loading import load_tokenizer
from src.models.reward_choices import SharedBaseAdapter
from src.rewards.adapter import AdapterReward, token_rows
from src.rewards.learned import LearnedReward
from src.types import RolloutReward
from tests.models.architectures import DECODERS, write
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    LORA,
    PAD,
    TinyCorpus,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    model_settings,
    ragged_rollout,
    same_bits,
    seeded,
    snapshot,
    tokenizer,
)

pytestmark = FOREIGN_WARNINGS


def train_adapter(path: str, folder: Path, seed: int = 1) -> str:
    """A run's folder with an adapter whose weights are noise, and the merged model."""
    choice = SharedBaseAdapter(model_settings(path), replace(LORA, rank=2))
    net = choice.build(choice.build_tokenizer(TinyCorpus()), seed, False)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    net.normalize(0.4, 1.5)
    net.save(folder, load_tokenizer(path))
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("base"), "gpt2")


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_adapter(base, tmp_path_factory.mktemp("run"))


def attached(base: str, run: str, **changes: Any) -> tuple[Any, AdapterReward]:
    roles, reward = make_roles(base, spread=0.1, **changes), AdapterReward(run, 3)
    roles.tokenizer = load_tokenizer(base)  # transformers reads a word-level tokenizer beside a Qwen2 in its own way
    return roles, reward.load(roles)


@pytest.mark.parametrize("name", DECODERS)
def test_on_the_shared_base_it_scores_as_the_merged_model_does(name: str, tmp_path: Path) -> None:
    """Checklist 24, 25, 27. Token by token: prompt, response and one end token, each row alone."""
    path = write(tmp_path / "base", name)
    run = train_adapter(path, tmp_path / "run")
    _, reward = attached(path, run)
    rollout = ragged_rollout()
    merged = AutoModelForSequenceClassification.from_pretrained(f"{run}/model").eval()
    expected = []
    for row in range(7):
        ids = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        ids += rollout.response_ids[row][rollout.response_mask[row]].tolist()
        ids += [] if rollout.finished[row] else [EOS]
        with torch.no_grad():
            expected.append(merged(input_ids=torch.tensor([ids])).logits.item())
    constant = getattr(merged.config, "score_bias", 0.0)
    scores = reward.score_rollout(rollout)
    assert scores.tolist() == pytest.approx([score + constant for score in expected], abs=1e-5)
    assert len(set(expected)) == 7


def test_it_scores_samples_as_the_learned_reward_scores_their_text(base: str, run: str) -> None:
    """Checklist 24. reward=adapter against reward=learned with the merged model, from the same run's folder."""
    texts, responses = ["the film", "a", "they loved"], [" was great .", " bad film , a great cast .", " the plot ."]
    prompts, answers = make_prompts(texts), [tokenizer()(text)["input_ids"] for text in responses]
    answers[1].append(EOS)
    width = max(map(len, answers))
    rollout = replace(
        ragged_rollout(rows=3),
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        response_ids=torch.tensor([row + [PAD] * (width - len(row)) for row in answers]),
        response_mask=torch.tensor([[t < len(row) for t in range(width)] for row in answers]),
        finished=torch.tensor([False, True, False]),
    )
    _, reward = attached(base, run)
    for merged in (LearnedReward(run, 2).load(), reward.standalone().load()):
        by_text = merged.score(texts, responses, [{}] * 3)
        assert_close(reward.score_rollout(rollout), by_text, atol=1e-5, rtol=0)


def test_the_rows_end_once() -> None:
    rollout = ragged_rollout()
    for row in token_rows(rollout, endings(tokenizer())):
        assert row[-1] == EOS
        assert row.count(EOS) == 1
    lengths = rollout.prompt_mask.sum(1) + rollout.response_mask.sum(1) + (~rollout.finished)
    assert [len(row) for row in token_rows(rollout, endings(tokenizer()))] == lengths.tolist()


def test_a_row_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    """24 + 24 tokens and the end token are one more than the model's 48 positions."""
    path = write(tmp_path / "base", "gpt2")
    _, reward = attached(path, train_adapter(path, tmp_path / "run"))
    rollout = ragged_rollout(rows=3, prompt=24, response=24)
    full = replace(
        rollout,
        prompt_mask=torch.ones_like(rollout.prompt_mask),
        response_mask=torch.ones_like(rollout.response_mask),
        prompt_ids=rollout.prompt_ids.clamp(min=4),
        response_ids=rollout.response_ids.clamp(min=4),
    )
    shorter = replace(full, prompt_ids=full.prompt_ids[:, 1:], prompt_mask=full.prompt_mask[:, 1:])
    assert_close(reward.score_rollout(full), reward.score_rollout(shorter))


def test_the_fourth_role_changes_nothing_of_the_other_three(base: str, run: str) -> None:
    """Checklist 33, 59, 60. Logprobs, values and who is trainable, before and after it was asked."""
    alone, (roles, reward) = make_roles(base, spread=0.1), attached(base, run)
    rollout = ragged_rollout()
    for _ in range(2):
        for role in ("policy", "reference"):
            assert torch.equal(
                roles.distribution(rollout, 1.0, role).logprobs(), alone.distribution(rollout, 1.0, role).logprobs()
            )
        assert torch.equal(roles.values(rollout), alone.values(rollout))
        reward.score_rollout(rollout)
        trainable = {name for name, p in roles.named_parameters() if p.requires_grad}
        assert trainable == {name for name, p in alone.named_parameters() if p.requires_grad}
        assert not any(".reward." in name or "score_head" in name for name in trainable)
    merged, expected = roles.merged_policy().state_dict(), alone.merged_policy().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_ppo_runs_with_four_roles_and_the_reward_is_bitwise_the_same_after(base: str, run: str, tmp_path: Path) -> None:
    """Checklist 59, 60, 65. It is in no optimizer, in no checkpoint, in eval mode; policy and critic have moved."""
    roles = make_roles(base)
    module = make_module(roles, reward=AdapterReward(run, 4), iterations=2)  # which loads it
    frozen = [p for name, p in roles.named_parameters() if ".reward." in name or "score_head" in name]
    before = snapshot(frozen), snapshot(roles.policy_parameters()), snapshot(roles.critic_parameters())
    recorder, trainer = fit(
        module, tmp_path, maker=make_maker(), callbacks=(IterationCheckpoint(str(tmp_path / "saved"), 1, 1),)
    )
    assert same_bits(before[0], frozen)
    assert not same_bits(before[1], roles.policy_parameters())
    assert not same_bits(before[2], roles.critic_parameters())
    assert len(frozen) == 2 + 2 * 8  # the head's weight and bias, A and B of eight layers
    assert not any(p.requires_grad for p in frozen)
    assert not any(part.training for part in roles.modules())
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(map(id, frozen))
    saved = torch.load(tmp_path / "saved/iteration-2.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert not [name for name in saved if ".reward." in name or "score_head" in name]
    scores = [row["rollout/score"] for row in recorder.by_step().values() if "rollout/score" in row]
    assert len(set(scores)) == 2


def test_it_is_a_reward_that_reads_rollouts(run: str) -> None:
    reward = AdapterReward(run, 4)
    assert isinstance(reward, RolloutReward)
    with pytest.raises(ModelError, match="is not loaded"):
        reward.score_rollout(ragged_rollout())
    with pytest.raises(SettingError, match="batch_size"):
        AdapterReward(run, 0)


def test_another_base_is_refused(base: str, run: str, tmp_path: Path) -> None:
    """One that has the same shapes and other weights, the same in another type, and another tokenizer."""
    for other in (make_roles(write(tmp_path / "b", "gpt2", seed=1)), make_roles(base, dtype="bfloat16")):
        with pytest.raises(ModelError, match=r"trained on another base: model\.path .* has the fingerprint"):
            AdapterReward(run, 4).load(other)
    roles = make_roles(base)
    roles.tokenizer.add_tokens(["new"])
    with pytest.raises(ModelError, match="trained on another base: the tokenizer"):
        AdapterReward(run, 4).load(roles)


def test_roles_without_a_shared_base_are_refused(base: str, run: str) -> None:
    with pytest.raises(ModelError, match="needs the policy's base"):
        AdapterReward(run, 4).load(None)
    with pytest.raises(ModelError, match=r"model\.lora=null"):
        AdapterReward(run, 4).load(make_roles(base, None))
    with pytest.raises(RuntimeError, match="no reward model"):
        make_roles(base).scores(torch.tensor([[4, EOS]]), torch.ones(1, 2).bool())


def test_a_folder_without_an_adapter_or_without_its_head_is_refused(base: str, tmp_path: Path) -> None:
    """Checklist 25. A policy's adapter is none; a head that is missing is never made up."""
    with pytest.raises(ModelError, match="there is no reward adapter"):
        AdapterReward(base, 4)
    make_roles(base).save_adapter(tmp_path / "ppo/adapter")
    with pytest.raises(ModelError, match=r"there is no reward adapter \(no reward.json\)"):
        AdapterReward(str(tmp_path / "ppo"), 4)
    run = Path(train_adapter(base, tmp_path / "run"))
    file = run / "adapter/adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with pytest.raises(ModelError, match="lacks the weights of the score head"):
        AdapterReward(str(run), 4).load(make_roles(base))
    facts = json.loads((run / "adapter/reward.json").read_text())
    (run / "adapter/reward.json").write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(ModelError, match="format 2 is not the format 1"):
        AdapterReward(str(run), 4).load(make_roles(base))


def test_seeds_give_different_adapters(base: str, run: str, tmp_path: Path) -> None:
    """Otherwise the comparisons above compare one model with itself."""
    other = seeded(lambda: train_adapter(base, tmp_path / "other", seed=2), 0)
    rollout = ragged_rollout()
    assert (
        attached(base, run)[1].score_rollout(rollout) - attached(base, other)[1].score_rollout(rollout)
    ).abs().min() > 1e-3


def test_a_reward_adapter_does_not_reach_the_trunk_of_the_other_roles(tmp_path: Path) -> None:
    """Checklist 58, 59. It may adapt every layer, also those that all other roles share and read once."""
    path = write(tmp_path / "base", "gpt2")
    roles = make_roles(path, replace(LORA, layers=1), spread=0.2)
    reward = AdapterReward(train_adapter(path, tmp_path / "reward"), batch_size=3).load(roles)
    maker, prompts = make_maker(), make_prompts(["the film", "they", "we liked the plot"])
    experience, _ = maker.make(roles, reward, prompts, 0, torch.Generator().manual_seed(0))
    assert experience.rollout.trunk is not None
    assert_close(experience.old_logprobs, experience.rollout.behavior_logprobs, atol=1e-4, rtol=0)
    whole = roles.distribution(replace(experience.rollout, trunk=None), 1.0).logprobs()
    assert_close(experience.old_logprobs, whole.detach(), atol=1e-5, rtol=0)
