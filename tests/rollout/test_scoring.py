"""What a reward may get wrong, and what becomes of the sample, the batch and the run."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from src.errors import RewardError, SettingError
from src.rewards.function import FunctionReward
from src.rewards.mix import MixReward
from src.rollout.scoring import Scorer
from src.types import Rollout
from tests.tiny import (
    FOREIGN_WARNINGS,
    ScriptedReward,
    ragged_rollout,
)

pytestmark = FOREIGN_WARNINGS

STOP, DROP = Scorer(timeout=None, drop_failed=False), Scorer(timeout=None, drop_failed=True)


class Faulty:
    """The scripted scores, save for responses in `bad`: there it gives that number, or raises that error."""

    def __init__(self, bad: dict[str, float | Exception]) -> None:
        self.bad = bad

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        scores = ScriptedReward().score(prompts, responses, metadata)
        for row, response in enumerate(responses):
            told = self.bad.get(response)
            if isinstance(told, Exception):
                raise told
            scores[row] = scores[row] if told is None else told
        return scores


class Says:
    """Answers with whatever it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        return self.answer


FAULTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "raises": ZeroDivisionError("oh no")}
CAME_BACK = {"nan": "gave nan", "inf": "gave inf", "-inf": "gave -inf", "raises": "raised ZeroDivisionError('oh no')"}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_sample_stops_with_all_there_is_to_know(fault: str) -> None:
    """Reward, prompt, response and what came back; the first one in the order of the batch."""
    with pytest.raises(RewardError) as caught:
        STOP.score(Faulty({"r3": FAULTS[fault], "r5": FAULTS[fault]}), ragged_rollout())
    expected = f"reward Faulty {CAME_BACK[fault]} for prompt 'p3', response 'r3'; a score must be a finite number"
    assert str(caught.value) == expected
    assert caught.value.__cause__ is (FAULTS[fault] if fault == "raises" else None)


def test_a_function_is_called_by_its_dotted_path() -> None:
    with pytest.raises(RewardError, match=r"reward my_rewards\.brevity gave nan for prompt 'p0'"):
        STOP.score(FunctionReward("my_rewards.brevity", lambda p, r, m: [math.nan] * len(p)), ragged_rollout())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_dropping_leaves_out_exactly_the_rows_that_failed(fault: str, timeout: float | None) -> None:
    rollout = ragged_rollout()
    scored = Scorer(timeout, drop_failed=True).score(Faulty({"r0": FAULTS[fault], "r5": FAULTS[fault]}), rollout)
    assert scored.dropped == 2
    assert scored.rollout.responses == ("r1", "r2", "r3", "r4", "r6")
    assert torch.equal(scored.rollout.response_ids, rollout.response_ids[[1, 2, 3, 4, 6]])
    kept = [f"p{i}" for i in (1, 2, 3, 4, 6)], [f"r{i}" for i in (1, 2, 3, 4, 6)]
    assert scored.scores.tolist() == pytest.approx(ScriptedReward().score(*kept, [{}] * 5))
    assert scored.credit.shape == (5, rollout.response_ids.shape[1])


def test_nothing_is_dropped_where_nothing_fails() -> None:
    rollout = ragged_rollout()
    scored = DROP.score(ScriptedReward(), rollout)
    assert (scored.dropped, scored.rollout, scored.parts) == (0, rollout, {})


@pytest.mark.parametrize("fault", FAULTS)
def test_when_every_sample_fails_the_run_stops(fault: str) -> None:
    """Even where failed samples are to be dropped."""
    with pytest.raises(RewardError, match=f"{re.escape(CAME_BACK[fault])} for prompt 'p0', response 'r0'"):
        DROP.score(Faulty({f"r{i}": FAULTS[fault] for i in range(7)}), ragged_rollout())


@pytest.mark.parametrize("fault", FAULTS)
def test_the_parts_of_a_mix_lose_the_same_rows(fault: str) -> None:
    """A part that fails takes its sample out of all of them; the others stay visible."""
    parts = {"faulty": Faulty({"r2": FAULTS[fault]}), "scripted": ScriptedReward()}
    scored = DROP.score(MixReward(parts, {"faulty": 1.0, "scripted": 1.0}), ragged_rollout())
    rows = [0, 1, 3, 4, 5, 6]
    expected = ScriptedReward().score([f"p{i}" for i in rows], [f"r{i}" for i in rows], [{}] * 6)
    assert {name: part.tolist() for name, part in scored.parts.items()} == dict.fromkeys(parts, expected)
    assert scored.scores.tolist() == pytest.approx(expected)
    assert scored.dropped == 1


@pytest.mark.parametrize("scorer", [STOP, DROP], ids=["stop", "drop"])
def test_an_answer_of_the_wrong_shape_stops_the_run(scorer: Scorer) -> None:
    """Which sample failed cannot be known then."""
    for answer, gave in (
        ([0.0] * 6, "6 numbers"),
        ([0.0], "1 number"),
        (torch.zeros(7, 1), "(7, 1) numbers"),
        (1.0, "a single number"),
        ([], "0 numbers"),
        (["good"], "['good']"),
        (None, "None"),
        ("goodwill", "'goodwill'"),  # as many letters and one more
        ("ratings", "'ratings'"),  # as many letters as responses
        ({"score": 1.0}, "{'score': 1.0}"),
        (dict.fromkeys(range(7), 1.0), "{0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0}"),
    ):
        with pytest.raises(RewardError) as caught:
            scorer.score(Says(answer), ragged_rollout())
        assert str(caught.value) == f"reward Says returned {gave} for 7 responses: one number for each is needed"


@pytest.mark.parametrize("scorer", [STOP, DROP], ids=["stop", "drop"])
@pytest.mark.parametrize("answer", [None, "0.5", {"score": 1.0}, (0.0 for _ in range(7)), object()])
def test_a_reward_that_returns_no_numbers_is_called_once(scorer: Scorer, answer: Any) -> None:
    """No single row is at fault."""
    asked = []

    def told(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        asked.append(len(prompts))
        return answer

    with pytest.raises(RewardError, match=r"reward told returned .* for 7 responses: one number for each is needed"):
        scorer.score(FunctionReward("told", told), ragged_rollout())
    assert asked == [7]


@pytest.mark.parametrize("bad", ["good", "0.5", None, [1.0, 2.0], {}, 1j, 10**400])
def test_an_element_that_is_no_number_is_named_or_dropped(bad: Any) -> None:
    answer = [0.0, 1.0, bad, 3, torch.tensor(4.0), bad, True]
    with pytest.raises(RewardError) as caught:
        STOP.score(Says(answer), ragged_rollout())
    gave = f"{bad!r}"[:80]
    assert str(caught.value).startswith(f"reward Says gave {gave} for prompt 'p2', response 'r2'; a score must be a")
    scored = DROP.score(Says(answer), ragged_rollout())
    assert scored.scores.tolist() == [0.0, 1.0, 3.0, 4.0, 1.0]
    assert scored.dropped == 2
    with pytest.raises(RewardError, match="for prompt 'p0', response 'r0'"):
        DROP.score(Says([bad, *["good"] * 6]), ragged_rollout())


def test_an_element_that_is_no_number_is_named_where_other_rows_raise() -> None:
    """Row by row, each row keeps its own reason."""

    class Moody:
        def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[Any]:
            if "r4" in responses:
                raise KeyError("r4")
            return ["bad" if response == "r1" else 1.0 for response in responses]

    with pytest.raises(RewardError, match="reward Moody gave 'bad' for prompt 'p1'"):
        STOP.score(Moody(), ragged_rollout())
    scored = DROP.score(Moody(), ragged_rollout())
    assert scored.rollout.responses == ("r0", "r2", "r3", "r5", "r6")


def test_a_reward_that_raises_for_the_batch_only_is_not_taken_row_by_row() -> None:
    def lonely(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        if len(prompts) > 1:
            raise OSError("too many")
        return [1.0]

    with pytest.raises(RewardError) as caught:
        DROP.score(FunctionReward("lonely", lonely), ragged_rollout())
    assert str(caught.value) == "reward lonely raised OSError('too many') for the batch, and for no row of it alone"


def test_whole_numbers_and_truth_values_are_scores() -> None:
    for answer in ([1, 0, 1, 1, 0, 0, 1], [True, False, True, True, False, False, True]):
        assert STOP.score(Says(answer), ragged_rollout()).scores.tolist() == [1, 0, 1, 1, 0, 0, 1]


def test_scores_carry_no_gradient() -> None:
    """A function may ask a model of its own and forget torch.no_grad."""
    weight = torch.ones(7, requires_grad=True)
    mix = MixReward({"a": Says(weight * 2), "b": Says(weight)}, {"a": 1.0, "b": 1.0})
    for reward in (Says(weight * 2), mix):
        assert not STOP.score(reward, ragged_rollout()).scores.requires_grad


# ---------------------------------------------------------------------------------------------------------- time limits


class Sleeper:
    """Waits until it is let go."""

    def __init__(self, awake: threading.Event, fail_first: bool = False) -> None:
        self.awake, self.fail_first, self.asked = awake, fail_first, 0

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        self.asked += 1
        if self.fail_first and self.asked == 1:
            raise OSError("a bad start")
        self.awake.wait(60)
        return [0.0] * len(prompts)


@pytest.fixture
def awake() -> Any:
    """Set at the end, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "reward"]:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("drop_failed", [False, True])
@pytest.mark.parametrize("fail_first", [False, True], ids=["batch", "row"])
def test_a_reward_that_hangs_is_given_up(awake: threading.Event, drop_failed: bool, fail_first: bool) -> None:
    """Once, not once for every row."""
    started, reward = time.perf_counter(), Sleeper(awake, fail_first)
    with pytest.raises(RewardError) as caught:
        Scorer(0.2, drop_failed).score(reward, ragged_rollout(rows=60))
    assert str(caught.value) == "reward Sleeper gave no answer within 0.2 s (ppo.reward_timeout)"
    assert 0.2 <= time.perf_counter() - started < 6  # 60 rows would take 12 s
    assert reward.asked == 1 + fail_first


def test_within_the_limit_scores_and_errors_are_those_without_one() -> None:
    limited = Scorer(60.0, drop_failed=False)
    assert torch.equal(
        limited.score(ScriptedReward(), ragged_rollout()).scores, STOP.score(ScriptedReward(), ragged_rollout()).scores
    )
    with pytest.raises(RewardError, match=r"raised ValueError\('r1'\) for prompt 'p1'"):
        limited.score(Faulty({"r1": ValueError("r1")}), ragged_rollout())


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_a_limit_that_nothing_can_keep_is_refused(timeout: float) -> None:
    with pytest.raises(SettingError, match="timeout must be greater than 0 seconds, or null"):
        Scorer(timeout, drop_failed=False)


# -------------------------------------------------------------------------------------------------------- token rewards


class Dense:
    """A tenth of its position for every token, and NaN wherever `bad` says."""

    def __init__(self, bad: list[tuple[int, int]]) -> None:
        self.bad = bad

    def score_tokens(self, rollout: Rollout) -> torch.Tensor:
        credit = torch.arange(rollout.response_mask.shape[1]).expand(rollout.response_mask.shape) / 10
        credit = credit.clone()
        for row, place in self.bad:
            credit[row, place] = math.nan
        return credit


def test_a_token_without_a_number_fails_its_sequence() -> None:
    rollout = ragged_rollout()
    last = int(rollout.response_mask[4].sum()) - 1
    with pytest.raises(RewardError, match="reward Dense gave nan for prompt 'p4', response 'r4'"):
        STOP.score(Dense([(4, last)]), rollout)
    scored = DROP.score(Dense([(4, last)]), rollout)
    assert scored.dropped == 1
    assert scored.rollout.responses == ("r0", "r1", "r2", "r3", "r5", "r6")
    expected = [
        [t / 10 if counts else 0.0 for t, counts in enumerate(m)] for m in scored.rollout.response_mask.tolist()
    ]
    torch.testing.assert_close(scored.credit, torch.tensor(expected))
    assert scored.scores.tolist() == pytest.approx([sum(row) for row in expected])


def test_what_a_token_reward_says_outside_the_mask_does_not_count() -> None:
    rollout = ragged_rollout()
    outside = [(row, place) for row, place in (~rollout.response_mask).nonzero().tolist()]
    assert len(outside) > 5
    assert torch.equal(STOP.score(Dense(outside), rollout).credit, STOP.score(Dense([]), rollout).credit)


class DenseFaulty(Dense):
    """The same, and for responses in `bad` it raises; remembers the sizes it was asked for."""

    def __init__(self, *bad: str) -> None:
        super().__init__([])
        self.responses, self.sizes = bad, list[int]()

    def score_tokens(self, rollout: Rollout) -> torch.Tensor:
        self.sizes.append(len(rollout.responses))
        for response in set(self.responses) & set(rollout.responses):
            raise KeyError(response)
        return super().score_tokens(rollout)


class DenseSays:
    """Answers a question for tokens with whatever it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score_tokens(self, rollout: Rollout) -> Any:
        return self.answer


@pytest.mark.parametrize("scorer", [STOP, DROP], ids=["stop", "drop"])
def test_a_token_reward_of_the_wrong_shape_stops_the_run(scorer: Scorer) -> None:
    """Nothing is spread over the tokens or rows that it was not meant for."""
    rollout = ragged_rollout()
    for shape in ((7, 1), (6,), (1, 6), (6, 7), ()):
        with pytest.raises(RewardError) as caught:
            scorer.score(DenseSays(torch.ones(shape)), rollout)
        gave = f"{shape} numbers" if len(shape) > 1 else "6 numbers" if shape else "a single number"
        assert str(caught.value) == f"reward DenseSays returned {gave} for (7, 6) tokens: one number for each is needed"


def test_a_token_reward_that_raises_is_named_or_its_rows_are_dropped() -> None:
    rollout = ragged_rollout()
    with pytest.raises(RewardError) as caught:
        STOP.score(DenseFaulty("r2"), rollout)
    assert str(caught.value).startswith("reward DenseFaulty raised KeyError('r2') for prompt 'p2', response 'r2'")
    reward = DenseFaulty("r2", "r6")
    scored, whole = DROP.score(reward, rollout), DROP.score(Dense([]), rollout)
    kept = [0, 1, 3, 4, 5]
    assert scored.dropped == 2
    assert reward.sizes == [7, *[1] * 7]
    assert torch.equal(scored.credit, whole.credit[kept])
    assert torch.equal(scored.scores, whole.scores[kept])
    with pytest.raises(RewardError, match=r"raised KeyError\('r0'\) for prompt 'p0'"):
        DROP.score(DenseFaulty(*rollout.responses), rollout)
    with pytest.raises(RewardError, match=r"reward DenseSays returned 'good' for \(7, 6\) tokens: one number"):
        DROP.score(DenseSays("good"), rollout)


def test_credit_of_a_token_reward_carries_no_gradient_and_is_float32() -> None:
    answer = torch.ones(7, 6, dtype=torch.float64, requires_grad=True) * 2
    scored = STOP.score(DenseSays(answer), ragged_rollout())
    assert (scored.credit.requires_grad, scored.scores.requires_grad) == (False, False)
    assert scored.credit.dtype == scored.scores.dtype == torch.float32
    assert torch.equal(scored.credit, 2.0 * ragged_rollout().response_mask)
    assert torch.equal(STOP.score(DenseSays([[2] * 6] * 7), ragged_rollout()).credit, scored.credit)


class Tokens:
    """Reads the token ids alone: the sum of those that count, or what it was told to answer."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def score_rollout(self, rollout: Rollout) -> Any:
        return (rollout.response_ids * rollout.response_mask).sum(1) if self.answer is None else self.answer


def test_a_reward_that_reads_rollouts_is_asked_and_checked_like_any_other() -> None:
    """Ids in, one number per row out; a wrong count and a number that is not finite are named."""
    rollout = ragged_rollout()
    expected = [sum(ids[mask].tolist()) for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    scored = Scorer(timeout=5.0, drop_failed=False).score(Tokens(), rollout)
    assert scored.scores.tolist() == expected
    assert not scored.credit.any()
    with pytest.raises(RewardError, match="reward Tokens returned 6 numbers for 7 responses"):
        STOP.score(Tokens(torch.zeros(6)), rollout)
    with pytest.raises(RewardError, match="reward Tokens gave nan for prompt 'p2'"):
        STOP.score(Tokens([0.0, 0.0, math.nan, 0.0, 0.0, 0.0, 0.0]), rollout)


def test_a_reward_that_ends_the_program_is_named() -> None:
    """`sys.exit` is no `Exception`: the run would end without a word."""

    class Leaving:
        def score(self, *given: Any) -> list[float]:
            sys.exit(3)

    with pytest.raises(RewardError, match=r"reward Leaving ended the program by sys\.exit\(3\)"):
        Scorer(None, drop_failed=True).score(Leaving(), ragged_rollout())


def test_a_trial_refuses_what_no_other_rows_could_mend() -> None:
    """Of errors only those that do not depend on texts and columns; whatever a function raises beside them may."""

    def returns(answer: Any) -> FunctionReward:
        return FunctionReward("mine", lambda prompts, responses, metadata: answer)

    def raises(error: BaseException) -> FunctionReward:
        def function(*texts: Any) -> Any:
            raise error

        return FunctionReward("mine", function)

    wanted, tried = "for 2 responses: one number for each is needed", "(tried with 2 made-up rows)"
    for reward, message in (
        (returns(None), f"reward mine returned None {wanted} {tried}"),
        (returns([0.5]), f"reward mine returned 1 number {wanted} {tried}"),
        (returns(0.5), f"reward mine returned a single number {wanted} {tried}"),
        (raises(NameError("name 'lenn' is not defined")),
         f"""reward mine raised NameError("name 'lenn' is not defined") {tried}"""),
        (raises(ModuleNotFoundError("No module named 'nope'")),
         f"""reward mine raised ModuleNotFoundError("No module named 'nope'") {tried}"""),
        (raises(SystemExit(3)), f"reward mine ended the program by sys.exit(3) {tried}"),
    ):  # fmt: skip
        with pytest.raises(RewardError) as refused:
            STOP.try_out(reward)
        assert str(refused.value) == message
    for reward in (returns([1, 2]), returns([math.nan, None]), returns(["good", 1]), raises(KeyError("stars"))):
        STOP.try_out(reward)
    STOP.try_out(
        FunctionReward(
            "mine", lambda p, r, m: [len(a) + len(b) + c["finished"] for a, b, c in zip(p, r, m, strict=True)]
        )
    )


def test_a_trial_of_a_reward_that_hangs_is_given_up(awake: threading.Event) -> None:
    with pytest.raises(RewardError, match=r"gave no answer within 0\.2 s \(ppo\.reward_timeout\) \(tried with 2"):
        Scorer(0.2).try_out(Sleeper(awake))


def test_one_number_for_all_is_no_answer() -> None:
    class Lazy:
        def score(self, *given: Any) -> float:
            return 0.5

    with pytest.raises(RewardError, match="reward Lazy returned a single number for 7 responses: one number"):
        Scorer(None, drop_failed=False).score(Lazy(), ragged_rollout())


@pytest.mark.parametrize("timeout", [None, 10.0])
def test_a_reward_changes_neither_the_rows_nor_the_working_directory(tmp_path: Path, timeout: float | None) -> None:
    """One that adds to its rows gives the same scores again, and one that goes elsewhere leaves the run's paths."""

    def wanders(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        os.chdir(tmp_path)
        for row in metadata:
            row["seen"].append("x")
        return [float(len(row["seen"])) for row in metadata]

    rollout = ragged_rollout()
    rollout = replace(rollout, metadata=tuple({"seen": []} for _ in rollout.prompts))
    scorer, before = Scorer(timeout), Path.cwd()
    for _ in range(2):
        assert set(scorer.score(FunctionReward("wanders", wanders), rollout).scores.tolist()) == {1.0}
    assert Path.cwd() == before


def test_a_table_in_another_order_is_no_answer() -> None:
    """A series keeps the labels of its rows: sorted, its places are no longer those of the responses."""
    rollout = ragged_rollout()
    scores = pd.Series([float(i) for i in range(len(rollout.prompts))])
    assert STOP.score(Says(scores), rollout).scores.tolist() == scores.tolist()
    with pytest.raises(RewardError, match=r"returned a Series with the index \[.*whose order is not clear .*to_list"):
        STOP.score(Says(scores[::-1]), rollout)
