"""Any Python function as the reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.errors import ConfigError, SettingError
from src.rewards.function import FunctionReward, as_reward
from src.rollout.scoring import Scorer
from tests.tiny import ragged_rollout


def test_the_function_is_given_texts_and_rows_and_is_called_by_its_path() -> None:
    """`finished` comes with each row; what the function says is the score, row by row."""
    seen: list[Any] = []

    def score(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        seen.append((prompts, responses, metadata))
        return [float(len(response)) + row["finished"] for response, row in zip(responses, metadata, strict=True)]

    reward = FunctionReward("my.rewards.score", score)
    assert reward.score(["a"], ["bcd"], [{"finished": True}]) == [4.0]
    rollout = ragged_rollout()
    scored = Scorer(timeout=None, drop_failed=False).score(reward, rollout)
    texts = list(rollout.prompts), list(rollout.responses), [{"finished": end} for end in rollout.finished.tolist()]
    assert seen[1] == texts
    assert torch.equal(scored.scores, torch.tensor(score(*texts)))
    assert reward.target == "my.rewards.score"


def two(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * len(prompts)


class Two:
    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0] * len(prompts)


def test_a_function_of_other_parameters_is_refused() -> None:
    with pytest.raises(
        SettingError, match=r"target must be a function of \(prompts, responses, metadata\), but is 'two'"
    ):
        FunctionReward("two", two)
    with pytest.raises(SettingError, match="target must be a function of"):
        FunctionReward("four", lambda a, b, c, d: [])
    for function in (lambda *texts: [], lambda prompts, responses, metadata, scale=2: [], max):
        FunctionReward("fine", function)


def test_an_async_function_is_refused() -> None:
    """It would return a coroutine, which nobody waits for."""

    async def score(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [0.0]

    class Scorers:
        async def __call__(
            self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
        ) -> list[float]:
            return [0.0]

    for function in (score, Scorers()):
        with pytest.raises(SettingError, match="target must be a plain function: an async one is not waited for"):
            FunctionReward("async", function)


def test_a_plain_function_is_a_reward() -> None:
    def brevity(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [-len(response) for response in responses]

    reward = as_reward(brevity)
    assert isinstance(reward, FunctionReward)
    assert reward.target.endswith("brevity")
    assert as_reward(reward) is reward
    assert Scorer(None).score(reward, ragged_rollout()).scores.tolist() == [-2.0] * 7


def test_a_reward_in_parts_needs_no_score() -> None:
    class Parts:
        def score_parts(self, prompts: list[str], responses: list[str], metadata: list[Any]) -> dict[str, Tensor]:
            return {"ones": torch.ones(len(prompts))}

        def combine(self, parts: dict[str, Tensor]) -> Tensor:
            return parts["ones"]

    reward = Parts()
    assert as_reward(reward) is reward
    assert Scorer(None).score(reward, ragged_rollout()).scores.tolist() == [1.0] * 7


def classifier() -> nn.Module:
    """As transformers' have it: a layer that is called score."""
    module = nn.Module()
    module.score = nn.Linear(1, 1)
    return module


def test_what_is_no_reward_is_refused_with_what_one_is() -> None:
    give = "give a function, or an object with score(prompts, responses, metadata)"
    takes = "takes (prompts: 'list[str]', responses: 'list[str]') -> 'list[float]'; a reward takes (prompts, responses,"
    for wrong, message in (
        (5, f"reward: int has no method score; {give}"),
        (None, f"reward: NoneType has no method score; {give}"),
        (nn.Linear(1, 1), f"reward: Linear has no method score; {give}"),
        (classifier(), f"reward: Module has no method score; {give}"),
        (Two, "reward: Two is a class; give an object, such as Two()"),
        (Two(), f"reward: Two {takes}"),
        (two, f"reward: two {takes}"),
    ):
        with pytest.raises(ConfigError) as refused:
            as_reward(wrong)
        assert str(refused.value).startswith(message)
