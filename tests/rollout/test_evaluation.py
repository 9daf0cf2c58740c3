"""The final comparison when the reward cannot score every answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from src.errors import RewardError
from src.evaluate.prompts import over_prompts, rows_of
from src.models.roles import Roles
from src.rollout.evaluation import Answers, Evaluation, Evaluator, merge
from src.rollout.scoring import Scorer
from tests.tiny import (
    FOREIGN_WARNINGS,
    PROMPTS,
    ScriptedReward,
    TinyCorpus,
    make_maker,
    make_prompts,
    make_roles,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

DROP = Scorer(timeout=None, drop_failed=True)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return make_roles(write_lm(tmp_path_factory.mktemp("base")), spread=0.2)


class Picky(ScriptedReward):
    """The scripted scores, NaN for texts of these sums of characters, modulo 3."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        scores = super().score(prompts, responses, metadata)
        sums = [sum(map(ord, p + r)) for p, r in zip(prompts, responses, strict=True)]
        return [math.nan if n % 3 in self.bad else s for n, s in zip(sums, scores, strict=True)]


def test_prompts_that_fail_in_either_role_are_left_out_and_n_says_how_many_are_left(roles: Roles) -> None:
    """What is left is what the same reward gives that fails on nothing, for the prompts scored in both roles."""
    prompts = make_prompts(PROMPTS)

    def compare(scorer: Scorer, reward: ScriptedReward) -> Evaluation:
        evaluator = Evaluator(make_maker(scorer=scorer), TinyCorpus(), seed=3)
        return merge([evaluator.evaluate(roles, reward, reward, prompts, 0)])

    whole, left = compare(DROP, ScriptedReward()), compare(DROP, Picky(0))
    answers = {"sft": whole.reference, "ppo": whole.policy}
    fails = {
        role: [sum(map(ord, p + r)) % 3 == 0 for p, r in zip(own.prompts, own.responses, strict=True)]
        for role, own in answers.items()
    }
    kept = [row for row in range(8) if not (fails["sft"][row] or fails["ppo"][row])]
    assert fails["sft"] != fails["ppo"]
    assert 0 < len(kept) < 8
    for role, figures in {"sft": left.reference.figures(), "ppo": left.policy.figures()}.items():
        expected = [answers[role].measures["score"][row] for row in kept]
        for name in ("score", "gold"):
            assert figures[name].value == pytest.approx(sum(expected) / len(kept))
            assert figures[name].n == len(kept)
        assert figures["response_length"].n == 8
    differences = [whole.policy.measures["score"][r] - whole.reference.measures["score"][r] for r in kept]
    assert left.improvement()["score"].value == pytest.approx(sum(differences) / len(kept))
    assert left.win_rate()["score"].value == pytest.approx(
        sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / len(kept)
    )
    assert left.improvement()["score"].n == left.win_rate()["gold"].n == len(kept)
    greedy = [left.reference.measures["greedy_score"], left.policy.measures["greedy_score"]]
    assert [math.isnan(x) for x in greedy[0]] == [math.isnan(x) for x in greedy[1]]
    with pytest.raises(RewardError, match="reward Picky gave nan for prompt"):
        compare(Scorer(timeout=None, drop_failed=False), Picky(0))


def test_a_comparison_without_any_scored_answer_has_no_score(roles: Roles) -> None:
    evaluator = Evaluator(make_maker(scorer=DROP), TinyCorpus(), seed=3)
    both = merge([evaluator.evaluate(roles, Picky(0, 1, 2), None, make_prompts(PROMPTS), 0)])
    with pytest.raises(RewardError, match="could score none of the answers"):
        both.policy.figures()


def test_a_measure_that_no_answer_has_is_left_out_unless_it_is_the_score() -> None:
    answers = Answers(("p", "q"), ("r", "s"), {"score": [1.0, 2.0], "gold": [math.nan, math.nan]})
    assert set(answers.figures()) == {"score", "distinct", "distinct_prompts", "distinct_2"}
    assert set(Evaluation(answers, answers).improvement()) == {"score"}


def test_answers_to_equal_prompts_count_as_one_in_the_interval() -> None:
    """Prompts p and q, 50 answers each, whose scores follow the prompt: two rows, not a hundred."""
    scores = [float(i % 2) + 0.5 for i in range(100)]
    answers = Answers(("p", "q") * 50, tuple(map(str, range(100))), {"score": scores, "kl": [0.0] * 100})
    better = Answers(answers.prompts, answers.responses, answers.measures | {"score": [2 * s for s in scores]})
    assert answers.figures()["score"].interval == (0.5, 1.5)
    assert Evaluation(answers, better).improvement()["score"].interval == (0.5, 1.5)
    assert answers.figures()["kl"].interval == (0.0, 0.0)  # an amount, no share of 0 of 100
    assert answers.figures()["distinct_prompts"].value == 0.02
    assert Evaluation(answers, better).win_rate()["score"].interval == pytest.approx((0.025**0.01, 1.0))


def test_rows_of_the_evaluation_without_a_score_are_null_and_count_for_no_prompt() -> None:
    answers = Answers(("p", "p", "q"), ("r", "s", "t"), {"score": [1.0, math.nan, 4.0]})
    assert [row["score"] for row in rows_of("given", answers)] == [1.0, None, 4.0]
    figure = over_prompts("score", answers.measures["score"], [0, 0, 1])
    assert (figure.value, figure.n) == (2.5, 2)
    assert over_prompts("score", [math.nan, 4.0], [0, 1]).n == 1
    right = over_prompts("score", [1.0] * 20, list(range(20)))
    assert right.interval == (pytest.approx(0.025 ** (1 / 20)), 1.0)  # exact: p^20 = 2.5 %


def test_scores_say_nan_for_whatever_is_no_number(roles: Roles) -> None:
    maker = make_maker(scorer=DROP)
    rollout = maker.sample(roles, "policy", make_prompts(PROMPTS), 0, torch.Generator().manual_seed(1))

    class Infinite(ScriptedReward):
        def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
            return [math.inf, -math.inf, *super().score(prompts, responses, metadata)[2:]]

    scores = DROP.scores(Infinite(), rollout).tolist()
    assert [math.isnan(score) for score in scores] == [True, True, *[False] * 6]
    assert scores[2:] == ScriptedReward().score(list(rollout.prompts), list(rollout.responses), [])[2:]
