"""A score per step, credited to the token that ends it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from src.errors import RewardError, SettingError
from src.rewards.steps import StepReward
from src.rollout.scoring import Scorer
from src.types import Rollout, TokenReward
from tests.tiny import ScriptedReward, ragged_rollout

END = 256


def byte_level() -> PreTrainedTokenizerFast:
    """A token per byte, by its value, and an end token: a letter beyond ASCII is several tokens."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    plain = Tokenizer(models.BPE({**vocabulary, "</s>": END}, [], byte_fallback=True))
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", clean_up_tokenization_spaces=False)


def rollout_of(*texts: str) -> Rollout:
    """Responses of a token per byte and an end token, each to the prompt "q"."""
    rows = [[*text.encode(), END] for text in texts]
    width = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return dataclasses.replace(
        ragged_rollout(len(rows)),
        prompt_ids=torch.full((len(rows), 1), ord("q")),
        prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        response_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        response_mask=mask,
        behavior_logprobs=torch.zeros(mask.shape),
        finished=torch.ones(len(rows), dtype=torch.bool),
        prompts=("q",) * len(rows),
        responses=texts,
    )


def by_steps(step: Any, mean: bool = False, separator: str = r"\n+") -> StepReward:
    reward = StepReward(step, separator, mean)
    return reward.load(SimpleNamespace(tokenizer=byte_level()))  # type: ignore[arg-type]


TEXTS = ("one\ntwo\n\nthree", "é🎬\nночь\n", "\n \nlate", "", "a\nb")
STEPS = (("one\n", "two\n\n", "three"), ("é🎬\n", "ночь\n"), ("\n \nlate",), ("",), ("a\n", "b"))


@pytest.mark.parametrize("mean", [False, True])
def test_each_step_is_scored_after_the_earlier_ones_and_credited_where_its_bytes_end(mean: bool) -> None:
    """With a token per byte a step's last token is the count of bytes up to its end; the last is the end token."""
    step, rollout = ScriptedReward(), rollout_of(*TEXTS)
    credit = by_steps(step, mean).score_tokens(rollout)
    expected = torch.zeros(rollout.response_mask.shape)
    asked = []
    for row, steps in enumerate(STEPS):
        assert "".join(steps) == TEXTS[row]
        for number, text in enumerate(steps):
            before, last = "q" + "".join(steps[:number]), number == len(steps) - 1
            column = len("".join(steps).encode()) if last else len("".join(steps[: number + 1]).encode()) - 1
            (score,) = ScriptedReward().score([before], [text], [{}])
            expected[row, column] += score / (len(steps) if mean else 1)
            asked.append((before, text, last))
    torch.testing.assert_close(credit, expected)
    ((prompts, responses, metadata),) = step.calls
    assert list(zip(prompts, responses, [row["finished"] for row in metadata], strict=True)) == asked


def test_the_score_of_a_response_is_the_sum_of_its_steps() -> None:
    rollout, reward = rollout_of(*TEXTS), by_steps(ScriptedReward())
    assert isinstance(reward, TokenReward)
    scored = Scorer().score(reward, rollout)
    sums = [
        sum(ScriptedReward().score(["q" + "".join(steps[:k])], [text], [{}])[0] for k, text in enumerate(steps))
        for steps in STEPS
    ]
    assert scored.scores.tolist() == pytest.approx(sums)
    assert scored.credit.sum(1).tolist() == pytest.approx(sums)


def test_a_step_without_a_number_fails_its_response_alone() -> None:
    class Sometimes:
        def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
            return [float("nan") if "two" in response else 1.0 for response in responses]

    scored = Scorer(drop_failed=True).score(by_steps(Sometimes()), rollout_of(*TEXTS))
    assert scored.dropped == 1
    assert scored.scores.tolist() == [len(steps) for steps in STEPS[1:]]
    with pytest.raises(RewardError, match=r"gave nan for prompt 'q', response 'one"):
        Scorer().score(by_steps(Sometimes()), rollout_of(*TEXTS))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(SettingError, match="does not match nothing"):
        by_steps(ScriptedReward(), separator=r"\n*")
    with pytest.raises(SettingError, match="a reward that scores text"):
        by_steps(object())
    with pytest.raises(RewardError, match="reward=steps credits tokens, so it needs the policy"):
        StepReward(ScriptedReward(), "x", True).load(None)
