"""Any Python function as the reward."""

from __future__ import annotations

from typing import Any

import torch

from src.rewards.function import FunctionReward
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
