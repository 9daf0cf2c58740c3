"""The experience of an iteration against plain Python on its own logprobs and values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from src.core.estimators import GAE
from src.errors import RewardError
from src.models.roles import Roles
from src.rollout.experience import ExperienceMaker
from src.rollout.kl_controller import AdaptiveKL, FixedKL
from src.rollout.shaping import IgnoreMissingEos, NoScaling, ScoreShaping, SetMissingEos, SubtractMissingEos
from src.types import Experience
from tests.tiny import (
    EOS,
    FIRST_WORD,
    FOREIGN_WARNINGS,
    LORA,
    PROMPTS,
    ScriptedReward,
    assert_rows_close,
    make_maker,
    make_prompts,
    make_roles,
    plain_logprobs,
    plain_model,
    rows_of,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return make_roles(write_lm(tmp_path_factory.mktemp("base")), spread=0.1)


def make(roles: Roles, maker: ExperienceMaker, reward: Any = None) -> tuple[Experience, dict[str, float]]:
    draws = torch.Generator().manual_seed(5)
    return maker.make(roles, reward or ScriptedReward(), make_prompts(PROMPTS), 4, draws)


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """sum_l (gamma lam)^l delta_{t+l}, term by term."""
    delta = [r + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, len(delta))) for t in range(len(delta))]


RULES = {
    "ignore": (None, IgnoreMissingEos(), lambda s, f: s),
    "set": (0.5, SetMissingEos(-2.0), lambda s, f: max(-0.5, min(0.5, s)) if f else -2.0),
    "subtract": (0.5, SubtractMissingEos(2.0), lambda s, f: max(-0.5, min(0.5, s)) - (0.0 if f else 2.0)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("whitened", [False, True], ids=["raw", "whitened"])
def test_every_number_is_that_of_plain_python(roles: Roles, rule: str, whitened: bool) -> None:
    """Checklist 16, 17, 18, 19, 20, 34, 35, 42. The KL is added after, and is no part of the clipping."""
    clip, missing, shaped = RULES[rule]
    maker = make_maker(
        shaping=ScoreShaping(NoScaling(), clip, missing),
        kl_controller=FixedKL(0.7),
        advantage=GAE(gamma=0.9, lam=0.8, critic_lam=0.6),
        whiten_advantages=whitened,
    )
    experience, measures = make(roles, maker)
    mask, finished = experience.mask, experience.rollout.finished.tolist()
    assert any(finished)
    assert not all(finished)
    old, ref, values = (
        rows_of(x.double(), mask) for x in (experience.old_logprobs, experience.ref_logprobs, experience.old_values)
    )
    rewards, advantages, returns, kls = [], [], [], []
    for row, score in enumerate(experience.scores.tolist()):
        kl = [a - b for a, b in zip(old[row], ref[row], strict=True)]
        reward = [-0.7 * k for k in kl]
        reward[-1] += shaped(score, finished[row])
        kls.append(sum(kl))
        rewards.append(reward)
        advantages.append(plain_gae(reward, values[row], 0.9, 0.8))
        returns.append([a + v for a, v in zip(plain_gae(reward, values[row], 0.9, 0.6), values[row], strict=True)])
    assert max(map(abs, kls)) > 0.05
    if whitened:
        flat = [a for row in advantages for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / (len(flat) - 1) + 1e-8)
        advantages = [[(a - mean) / std for a in row] for row in advantages]
    assert_rows_close(rows_of(experience.rewards, mask), rewards, 1e-5)
    assert_rows_close(rows_of(experience.advantages, mask), advantages, 1e-4)
    assert_rows_close(rows_of(experience.returns, mask), returns, 1e-5)
    assert measures["rollout/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-5)
    assert measures["rollout/reward"] == pytest.approx(sum(map(sum, rewards)) / len(rewards), abs=1e-5)
    for name in ("rewards", "advantages", "returns", "old_logprobs", "ref_logprobs", "old_values"):
        tensor = getattr(experience, name)
        assert not tensor[~mask].any()
        assert not tensor.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behavior_old_and_reference_logprobs_share_one_temperature(roles: Roles, temperature: float) -> None:
    """Checklist 14, 15, 58. And come from a whole forward, not from the sampler."""
    rollout = (experience := make(roles, make_maker(temperature=temperature))[0]).rollout
    mask = rollout.response_mask
    policy = plain_logprobs(plain_model(roles, "policy"), rollout, temperature)
    reference = plain_logprobs(plain_model(roles, "reference"), rollout, temperature)
    assert_rows_close(rows_of(experience.old_logprobs, mask), policy, 1e-5)
    assert_rows_close(rows_of(experience.ref_logprobs, mask), reference, 1e-5)
    assert_rows_close(rows_of(rollout.behavior_logprobs, mask), policy, 1e-5)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_size_of_forward_passes_changes_nothing(roles: Roles, size: int) -> None:
    """Checklist 3, 42. Whitening is over the whole batch, however much is scored at a time."""
    expected, _ = make(roles, make_maker(batch_size=3))
    experience, _ = make(roles, make_maker(batch_size=size))
    for name in ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(experience, name), getattr(expected, name), atol=1e-4, rtol=0)


def test_the_reward_reads_prompt_response_and_whether_it_ended(roles: Roles) -> None:
    """Checklist 24. The columns of the data row arrive, and `finished` beside them."""
    reward = ScriptedReward()
    experience, _ = make(roles, make_maker(), reward)
    rollout, words = experience.rollout, roles.tokenizer
    ((prompts, responses, metadata),) = reward.calls
    assert prompts == PROMPTS
    for row in range(len(PROMPTS)):
        tokens = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        assert responses[row] == "".join(words.convert_ids_to_tokens([t for t in tokens if t >= FIRST_WORD]))
        assert metadata[row] == {"row": row, "finished": tokens[-1] == EOS}
    assert all("finished" not in row for row in rollout.metadata)
    assert rollout.policy_version == 4


class Wrong:
    """A reward that answers with whatever it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        return self.answer


def test_a_wrong_number_of_scores_is_an_error_that_names_the_reward(roles: Roles) -> None:
    """Checklist 16."""
    with pytest.raises(RewardError, match="reward Wrong returned 7 numbers for 8 responses"):
        make(roles, make_maker(), Wrong([0.0] * 7))
    with pytest.raises(RewardError, match=r"reward Wrong returned \(8, 1\) numbers for 8 responses"):
        make(roles, make_maker(), Wrong(torch.zeros(8, 1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error_that_names_everything(roles: Roles, bad: float) -> None:
    """Checklist 13."""
    scores = [0.0] * 8
    scores[2] = bad
    response = make(roles, make_maker())[0].rollout.responses[2]
    with pytest.raises(RewardError, match="reward Wrong gave") as caught:
        make(roles, make_maker(), Wrong(scores))
    for part in (repr(PROMPTS[2]), repr(response), str(bad)):
        assert part in str(caught.value)


def test_the_controller_is_moved_after_its_coefficient_was_used(roles: Roles) -> None:
    """Checklist 30, 32. The KL that is logged is the one that steers, per sequence, and counts episodes."""
    controller = AdaptiveKL(0.5, kl_target=0.01, kl_horizon=100)
    maker = make_maker(kl_controller=controller)
    _, measures = make(roles, maker)
    assert measures["rollout/kl_coef"] == 0.5
    error = max(-0.2, min(0.2, measures["rollout/kl"] / 0.01 - 1))
    assert controller.kl_coef == pytest.approx(0.5 * (1 + error * 8 / 100), rel=1e-9)
    assert make(roles, maker)[1]["rollout/kl_coef"] == controller.kl_coef or controller.kl_coef != 0.5


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_kl_is_exactly_zero_before_any_step(lora: Any, tmp_path: Path) -> None:
    """Checklist 33."""
    roles = make_roles(write_lm(tmp_path), lora)
    experience, measures = make(roles, make_maker())
    assert torch.equal(experience.old_logprobs, experience.ref_logprobs)
    assert measures["rollout/kl"] == 0


def test_response_statistics_are_counted_by_hand(roles: Roles) -> None:
    experience, measures = make(roles, make_maker())
    rollout = experience.rollout
    lengths = [sum(row) for row in rollout.response_mask.tolist()]
    nats = -sum(sum(row) for row in rows_of(rollout.behavior_logprobs, rollout.response_mask))
    assert measures["rollout/response_length"] == pytest.approx(sum(lengths) / 8)
    assert measures["rollout/eos_fraction"] == sum(rollout.finished.tolist()) / 8
    assert measures["rollout/nll_per_token"] == pytest.approx(nats / sum(lengths), rel=1e-5)
