"""A reward that is served and asked over HTTP is the reward itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from tenacity import wait_none

from src.errors import RewardError
from src.rewards.http import HttpReward
from src.rewards.learned import LearnedReward
from src.rewards.rules import LengthReward
from src.rewards.vader import Vader
from src.rewards.verifiers import NumericMatch
from src.serve_reward import build_app
from tests.servers import serving
from tests.tiny import FOREIGN_WARNINGS, fit, make_maker, make_module, make_roles, write_lm, write_reward_model

pytestmark = FOREIGN_WARNINGS

PROMPTS = ["The film was", "The film was not", "ночь", "夜 ", "", "A bad"]
RESPONSES = [" good, really good.", " good.", " 🎬 великолепно!", "素晴らしい", "I loved it!", ' film\n\t"quotes" \\ .']


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def asking(url: str, **changes: Any) -> HttpReward:
    plain: dict[str, Any] = {"timeout": 30.0, "patience": 30.0, "attempts": 1, "concurrency": 4, "batch_size": 2}
    return HttpReward(url, **(plain | {"label_column": "answer", "token_variable": "REWARD_TOKEN"} | changes))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> LearnedReward:
    return LearnedReward(write_reward_model(tmp_path_factory.mktemp("reward")), 4).load()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


def test_a_served_rule_gives_the_same_bits() -> None:
    """Floats survive JSON."""
    prompts, responses = PROMPTS * 9, RESPONSES * 8 + PROMPTS
    expected = Vader().score(prompts, responses, [{}] * 54)
    assert len(set(expected)) >= 5
    with serving(build_app(Vader(), "answer", "", 10**6)) as url:
        assert asking(url).score(prompts, responses, [{}] * 54) == expected


def test_a_served_reward_model_gives_the_same_scores(learned: LearnedReward) -> None:
    """Up to rounding: other texts share its batches."""
    words = ["the film was great .", "a bad", "we", "they loved a dull end , we did not .", "great ."]
    prompts, responses = [a for a in words for _ in words], [f" {b}" for _ in words for b in words]
    expected = learned.score(prompts, responses, [{}] * 25).tolist()
    assert max(expected) - min(expected) > 0.1
    with serving(build_app(learned, "answer", "", 10**6)) as url:
        for batch_size in (1, 3, 64):
            assert asking(url, batch_size=batch_size).score(prompts, responses, [{}] * 25) == pytest.approx(
                expected, abs=1e-5
            )


def without_scores(log: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """The log but for what the server calls `scores`, which is the reward here."""
    assert all(row["rollout/score_scores"] == pytest.approx(row["rollout/score"], abs=1e-6) for row in log.values())
    return {step: {k: v for k, v in row.items() if k != "rollout/score_scores"} for step, row in log.items()}


@pytest.mark.parametrize("kind", ["vader", "learned"])
def test_ppo_against_a_served_reward_is_ppo_in_process(
    kind: str, base: str, learned: LearnedReward, tmp_path: Path
) -> None:
    """The same rollout; with a rule every number of the log has the very same bits."""

    def train(reward: Any) -> dict[int, dict[str, float]]:
        recorder, _ = fit(make_module(make_roles(base), reward=reward), tmp_path, maker=make_maker())
        return recorder.by_step()

    reward = Vader() if kind == "vader" else learned
    expected = train(reward)
    with serving(build_app(reward, "answer", "", 10**6)) as url:
        found = without_scores(train(asking(url)))
    assert sorted(found) == [1, 2]
    for step, row in expected.items():
        assert row["rollout/score_std"] > 0.01
        if kind == "vader":
            assert found[step] == row
        for name in ("score", "score_std", "shaped_score", "reward"):
            assert found[step][f"rollout/{name}"] == pytest.approx(row[f"rollout/{name}"], abs=1e-5)


def test_ppo_loses_nothing_to_a_server_that_fails_every_fifth_time(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 20 in 100 of all answers an error: the very same numbers, and no sample left out."""
    monkeypatch.setattr("tenacity.wait_random_exponential", lambda **_: wait_none())
    app, fate, fates = build_app(Vader(), "answer", "", 10**6), Random(1), []

    @app.middleware("http")
    async def failing(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        fates.append(fate.random() < 0.2)
        return PlainTextResponse("out of order", 500) if fates[-1] else await answer(request)

    def train(reward: Any) -> dict[int, dict[str, float]]:
        module = make_module(make_roles(base), reward=reward, iterations=8)
        return fit(module, tmp_path, maker=make_maker(), iterations=8)[0].by_step()

    expected = train(Vader())
    with serving(app) as url:
        found = without_scores(train(asking(url, batch_size=1)))
    assert 0.1 < sum(fates) / len(fates) < 0.3
    assert found == expected
    assert {row["rollout/dropped"] for row in found.values()} == {0.0}


def test_the_client_s_token_opens_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run without it stops with the server's word, after one attempt."""
    with serving(build_app(LengthReward(1), "answer", "tök", 10**6)) as url:
        with pytest.raises(RewardError, match="status 401: a bearer token is needed"):
            asking(url, attempts=5).score(["p"], [" one"], [{}])
        monkeypatch.setenv("REWARD_TOKEN", "tök")
        assert asking(url).score(["p"], [" one two"], [{}]) == [-1.0]


def test_pieces_that_are_too_long_for_the_server_say_so() -> None:
    with serving(build_app(LengthReward(1), "answer", "", 1000)) as url:
        with pytest.raises(RewardError, match="status 413: the body has more than 1000 bytes"):
            asking(url, attempts=5).score(["p"], ["x" * 100_000], [{}])


def test_a_served_verifier_reads_the_column_that_the_client_sends() -> None:
    rows = [{"gold": 4, "answer": 9}, {"gold": 5}, {"gold": "4"}]
    with serving(build_app(NumericMatch("answer", "", 0.0), "answer", "", 10**6)) as url:
        scores = asking(url, label_column="gold").score(["2+2="] * 3, ["4", "4", " it is 4."], rows)
    assert scores == [1.0, 0.0, 1.0]
