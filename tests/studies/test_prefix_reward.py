"""The gain of each token in a reward of the text so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from src.types import Rollout, TokenReward
from studies.estimators.prefix_reward import PrefixGain
from tests.tiny import FIRST_WORD, ScriptedReward, ragged_rollout, tokenizer


class Ending(ScriptedReward):
    """A scripted reward that is 10 higher for a response that ended by itself."""

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        scores = super().score(prompts, responses, metadata)
        return [s + 10 * m["finished"] for s, m in zip(scores, metadata, strict=True)]


def words(ids: list[int]) -> str:
    """The text of some tokens by looking each one up; special ones have none."""
    return "".join(tokenizer().convert_ids_to_tokens([i for i in ids if i >= FIRST_WORD]))


def make_rollout(*, hole: bool = False) -> Rollout:
    """Ragged responses of 1 to 6 tokens, a row without any token, and columns of data; `hole`: one token skipped."""
    rollout = ragged_rollout()
    mask, finished = rollout.response_mask.clone(), rollout.finished.clone()
    mask[3], finished[3] = False, False
    assert mask[-1].all()
    if hole:
        mask[-1, 2] = False
    prompts = tuple(words(row[m].tolist()) for row, m in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True))
    columns = tuple({"row": i} for i in range(len(mask)))
    return replace(rollout, response_mask=mask, finished=finished, prompts=prompts, metadata=columns)


def counted(rollout: Rollout, row: int) -> list[int]:
    return rollout.response_ids[row][rollout.response_mask[row]].tolist()


def one_score(rollout: Rollout, row: int, length: int) -> float:
    """Of the first `length` tokens of a response, asked on its own."""
    response = counted(rollout, row)
    ended = length == len(response) and bool(rollout.finished[row])
    (score,) = Ending().score([rollout.prompts[row]], [words(response[:length])], [{"finished": ended}])
    return score


@pytest.mark.parametrize("hole", [False, True], ids=["plain", "hole"])
def test_each_token_gains_the_difference_of_two_prefixes(hole: bool) -> None:
    """Checklist 12, 16, 37. Ragged rows, a row without tokens; 0 where none counts."""
    rollout = make_rollout(hole=hole)
    gains = PrefixGain(Ending(), tokenizer()).score_tokens(rollout)
    assert gains.shape == rollout.response_mask.shape
    assert not gains[~rollout.response_mask].any()
    for row, mask in enumerate(rollout.response_mask):
        length = len(counted(rollout, row))
        expected = [one_score(rollout, row, t + 1) - one_score(rollout, row, t) for t in range(length)]
        assert gains[row][mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(g, 3) for g in gains[rollout.response_mask].tolist()}) > 5


def test_the_gains_of_a_response_telescope() -> None:
    """Checklist 16. Their sum is the whole score less that of no response at all."""
    rollout = make_rollout()
    sums = PrefixGain(Ending(), tokenizer()).score_tokens(rollout).sum(1).tolist()
    whole = [one_score(rollout, row, len(counted(rollout, row))) for row in range(7)]
    (empty,) = zip(*[Ending().score([p], [""], [{"finished": False}]) for p in rollout.prompts], strict=True)
    assert sums == pytest.approx([w - e for w, e in zip(whole, empty, strict=True)], abs=1e-5)
    assert min(map(abs, (s for row, s in enumerate(sums) if row != 3))) < 10 < max(sums)


def test_every_prefix_is_asked_for_once_and_only_a_whole_response_has_finished() -> None:
    """Checklist 19, 24. With the prompt and the columns of its row."""
    rollout, reward = make_rollout(), ScriptedReward()
    PrefixGain(reward, tokenizer()).score_tokens(rollout)
    ((prompts, responses, metadata),) = reward.calls
    expected = []
    for row, prompt in enumerate(rollout.prompts):
        response, finished = counted(rollout, row), bool(rollout.finished[row])
        for length in range(len(response) + 1):
            ended = finished and length == len(response)
            expected.append((prompt, words(response[:length]), {"row": row, "finished": ended}))
    assert list(zip(prompts, responses, metadata, strict=True)) == expected
    assert sum(m["finished"] for m in metadata) == int(rollout.finished.sum()) >= 3
    assert all("finished" not in row for row in rollout.metadata)


def test_scores_as_a_tensor_count_the_same() -> None:
    """Also in double precision; the gains are single."""

    class Tensors(ScriptedReward):
        def score(self, *arguments: Any) -> Any:
            return torch.tensor(super().score(*arguments), dtype=torch.float64)

    plain, tensors = (PrefixGain(r, tokenizer()).score_tokens(make_rollout()) for r in (ScriptedReward(), Tensors()))
    assert plain.any()
    torch.testing.assert_close(tensors, plain)


def test_it_credits_tokens_and_a_plain_reward_does_not() -> None:
    """The experience maker tells them apart by this."""
    assert isinstance(PrefixGain(ScriptedReward(), tokenizer()), TokenReward)
    assert not isinstance(ScriptedReward(), TokenReward)
