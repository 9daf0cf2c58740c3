"""A reward over HTTP against a real server that misbehaves on purpose."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from tenacity import wait_none

from src.errors import RewardError, SettingError
from src.rewards.http import HttpReward
from tests.servers import FAULTS, free_port, misbehaving, score_of

PROMPTS, RESPONSES = ["the film", "a", "ночь", ""], [" was great .", " bad film \n.", " 🎬", " we"]
ROWS: list[dict[str, Any]] = [{"answer": 7}, {}, {"answer": "é", "finished": True}, {"answer": [1, None]}]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
REFUSED = ["401", "403", "404", "413"]
FAULTY = [name for name in FAULTS if name not in ("ok", "late", *REFUSED)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waits between attempts, no proxy, no token; what is retried and how often stays as it is."""
    monkeypatch.setattr("tenacity.wait_random_exponential", lambda **_: wait_none())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("REWARD_TOKEN", raising=False)


def reward(url: str, **changes: Any) -> HttpReward:
    plain: dict[str, Any] = {
        "timeout": 30.0,
        "attempts": 3,
        "concurrency": 4,
        "batch_size": 64,
        "label_column": "answer",
        "token_variable": "REWARD_TOKEN",
    }
    return HttpReward(url, **(plain | changes))


def in_turn(*names: str) -> Callable[[dict[str, Any]], str]:
    """These, one for each request; then "ok"."""
    left = list(names)
    return lambda body: left.pop(0) if left else "ok"


@pytest.mark.parametrize("fault", FAULTY)
def test_what_goes_wrong_is_tried_again_and_ends_in_one_sentence(fault: str) -> None:
    """Address, number of attempts, number of texts and the first of them; then what it was."""
    with misbehaving(lambda body: fault) as server:
        asked = reward(server.url, timeout=0.1 if fault == "slow" else 30.0)
        with pytest.raises(RewardError) as caught:
            asked.score(PROMPTS, RESPONSES, ROWS)
    expected = (
        f"reward server {server.url}: 3 failed attempts for 4 texts, the first of them {TEXTS[0]!r}; the last time: "
    )
    said = str(caught.value)
    assert said.startswith(expected)
    assert len(said) > len(expected)
    assert len(server.bodies) == 3
    if fault.isdigit():
        assert said.endswith(f"status {fault}")


@pytest.mark.parametrize("fault", FAULTY)
def test_a_good_answer_after_bad_ones_is_taken(fault: str) -> None:
    with misbehaving(in_turn(fault, fault)) as server:
        asked = reward(server.url, timeout=0.3 if fault == "slow" else 30.0)
        assert asked.score(PROMPTS, RESPONSES, ROWS) == [score_of(text) for text in TEXTS]
        assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[1] == server.bodies[2]


def test_nothing_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(
        RewardError, match=rf"^reward server {re.escape(url)}: 2 failed attempts for 4 texts, .* refused"
    ):
        reward(url, attempts=2).score(PROMPTS, RESPONSES, ROWS)


@pytest.mark.parametrize("status", REFUSED)
def test_what_another_attempt_cannot_change_is_not_tried_again(status: str) -> None:
    with misbehaving(lambda body: status) as server:
        with pytest.raises(RewardError) as caught:
            reward(server.url).score(PROMPTS, RESPONSES, ROWS)
        assert len(server.bodies) == 1
    assert str(caught.value) == f"reward server {server.url}: status {status}: says why"


def test_waits_are_random_and_double_up_to_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th wait is drawn between 0 and 0.1 * 2^n s, at most 10: of 20 draws the longest is near its end."""
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waits.append))
    random.seed(1)
    with misbehaving(lambda body: "500") as server:
        for _ in range(20):
            with pytest.raises(RewardError):
                reward(server.url, attempts=9).score(PROMPTS[:1], RESPONSES[:1], ROWS[:1])
    for number in range(8):
        drawn, end = waits[number::8], min(10, 0.1 * 2**number)
        assert len(drawn) == 20
        assert min(drawn) < end / 3
        assert end * 2 / 3 < max(drawn) <= end


# ------------------------------------------------------------------------------------------------------- many pieces


def many(count: int) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    draws = Random(5)
    words = ["film", "great", "bad", "ночь", "the", "."]
    texts = [" ".join(draws.choices(words, k=draws.randint(1, 9))) for _ in range(count)]
    return [f"prompt {i}" for i in range(count)], texts, [{"answer": i} for i in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_random_failures_lose_nothing_and_change_no_score(share: float) -> None:
    """Seeded by text and attempt, so that threads do not matter. Fast and late pieces come back in the order asked."""
    quick = [name for name in FAULTY if name != "slow"]
    attempts: Counter[str] = Counter()
    failures: list[str] = []

    def says(body: dict[str, Any]) -> str:
        first = body["query"][0]
        attempts[first] += 1
        draws = Random(f"{first}/{attempts[first]}")
        if draws.random() < share:
            failures.append(draws.choice(quick))
            return failures[-1]
        return draws.choice(["ok", "late"])

    prompts, responses, rows = many(200)
    with misbehaving(says) as server:
        scores = reward(server.url, batch_size=3, concurrency=8, attempts=30).score(prompts, responses, rows)
        assert 1 < server.most <= 8
    assert scores == [score_of(p + r) for p, r in zip(prompts, responses, strict=True)]
    pieces = -(-200 // 3)
    assert len(attempts) == pieces
    assert len(server.bodies) == pieces + len(failures)
    assert (len(failures) > pieces * share / 2) == (share > 0)


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_texts_go_out_in_pieces_of_the_batch_size(batch_size: int, sizes: list[int]) -> None:
    prompts, responses, rows = many(7)
    with misbehaving(in_turn()) as server:
        scores = reward(server.url, batch_size=batch_size, concurrency=1).score(prompts, responses, rows)
    assert scores == [score_of(p + r) for p, r in zip(prompts, responses, strict=True)]
    assert [len(body["query"]) for body in server.bodies] == sizes
    assert [label for body in server.bodies for label in body["labels"]] == list(range(7))


def test_where_one_piece_fails_the_others_are_not_asked_for_in_vain() -> None:
    """Of 50 pieces only those under way are tried to the end; a server that is down costs its time once."""
    with misbehaving(lambda body: "500") as server, pytest.raises(RewardError):
        reward(server.url, batch_size=1, concurrency=2).score(*many(50))
    assert 3 <= len(server.bodies) < 30


def test_no_texts_ask_nothing() -> None:
    with misbehaving(in_turn()) as server:
        assert reward(server.url).score([], [], []) == []
    assert server.bodies == []


# ----------------------------------------------------------------------------------------------------- what is sent


def test_the_body_has_whole_texts_prompts_and_labels() -> None:
    """A row without the column has the label ""; other columns stay here. Letters of any script arrive."""
    with misbehaving(in_turn()) as server:
        reward(server.url).score(PROMPTS, RESPONSES, ROWS)
    assert server.bodies == [{"query": TEXTS, "prompts": PROMPTS, "labels": [7, "", "é", [1, None]]}]
    (headers,) = server.headers
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


@pytest.mark.parametrize("token", ["s3cret", "s3cret\n", "tök"])
def test_the_token_of_the_environment_variable_is_sent(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read when texts are scored; white space around it, as files have it, is no part of it."""
    with misbehaving(in_turn()) as server:
        asked = reward(server.url, token_variable="MY_TOKEN")
        monkeypatch.setenv("REWARD_TOKEN", "another")
        monkeypatch.setenv("MY_TOKEN", token)
        asked.score(PROMPTS, RESPONSES, ROWS)
    sent = server.headers[0]["Authorization"].encode("latin-1").decode()  # http.server reads headers as latin-1
    assert sent == f"Bearer {token.strip()}"


def test_a_token_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    for fault in ("401", "500"):
        with misbehaving(lambda body, fault=fault: fault) as server, pytest.raises(RewardError) as caught:
            reward(server.url).score(PROMPTS, RESPONSES, ROWS)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("url", "localhost:8000", "an address that starts with http:// or https://"),
        ("timeout", 0.0, "greater than 0 seconds"),
        ("attempts", 0, "at least 1"),
        ("concurrency", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        reward(**({"url": "http://x/"} | {key: value}))
    assert (caught.value.name, caught.value.value, caught.value.allowed) == (key, value, allowed)


def test_it_can_be_asked_from_several_threads_at_once() -> None:
    prompts, responses, rows = many(40)
    expected = [score_of(p + r) for p, r in zip(prompts, responses, strict=True)]
    answers: list[list[float]] = []
    with misbehaving(in_turn()) as server:
        asked = reward(server.url, batch_size=7)
        work = lambda: answers.append(asked.score(prompts, responses, rows))  # noqa: E731
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [expected] * 3
