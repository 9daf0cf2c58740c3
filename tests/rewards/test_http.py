"""A reward over HTTP against a real server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from tenacity import wait_none

from src.config.compose import compose
from src.errors import ConfigError, RewardError, SettingError, without_secrets
from src.rewards.http import HttpReward
from src.rewards.request import AWAY
from tests.servers import FAULTS, free_port, misbehaving, score_of

PROMPTS, RESPONSES = ["the film", "a", "ночь", ""], [" was great .", " bad film \n.", " 🎬", " we"]
ROWS: list[dict[str, Any]] = [{"answer": 7}, {}, {"answer": "é", "finished": True}, {"answer": [1, None]}]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
REFUSED = [name for name in FAULTS if name.isdigit() and int(name) not in AWAY]
AWAY_OR_CUT = ["slow", "cut", "hang up", "no gzip", *map(str, AWAY)]  # no answer, or none that is whole
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
        "patience": 300.0,
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
    """Address, number of attempts, number of texts and the first of them; then what it was.

    An answer that cannot be used ends the run after `attempts`, a server that is away only after `patience`.
    """
    with misbehaving(lambda body: fault) as server:
        asked = reward(
            server.url, timeout=0.1 if fault == "slow" else 30.0, patience=0.25 if fault in AWAY_OR_CUT else 300
        )
        with pytest.raises(RewardError) as caught:
            asked.score(PROMPTS, RESPONSES, ROWS)
    tries = len(server.bodies)
    what = f"{tries} failed attempts for 4 texts, the first of them {TEXTS[0]!r}; the last time: "
    expected = f"reward server {server.url}: {what}"
    said = str(caught.value)
    assert said.startswith(expected)
    assert len(said) > len(expected)
    assert tries > 3 if fault in AWAY_OR_CUT and fault != "slow" else tries == 3
    if fault.isdigit():
        assert said.endswith(f"status {fault}: says why")


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
        RewardError, match=rf"^reward server {re.escape(url)}: \d+ failed attempts for 4 texts, .* (refused|failed)"
    ):
        reward(url, patience=0.1).score(PROMPTS, RESPONSES, ROWS)


@pytest.mark.parametrize("status", REFUSED)
def test_what_another_attempt_cannot_change_is_not_tried_again(status: str) -> None:
    with misbehaving(lambda body: status) as server:
        with pytest.raises(RewardError) as caught:
            reward(server.url).score(PROMPTS, RESPONSES, ROWS)
        assert len(server.bodies) == 1
    assert str(caught.value) == f"reward server {server.url}: status {status}: says why"


def test_an_address_that_moved_is_named() -> None:
    with misbehaving(lambda body: "moved") as server:
        with pytest.raises(RewardError, match=r"status 307: moved to /elsewhere, which is not followed: give that"):
            reward(server.url).score(PROMPTS, RESPONSES, ROWS)
        assert len(server.bodies) == 1


def test_waits_are_random_and_double_up_to_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th wait is drawn between 0 and 0.1 * 2^n s, at most 10: of 20 draws the longest is near its end."""
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits = waits_are_noted(monkeypatch)
    random.seed(1)
    with misbehaving(lambda body: "empty") as server:
        for _ in range(20):
            with pytest.raises(RewardError):
                reward(server.url, attempts=9).score(PROMPTS[:1], RESPONSES[:1], ROWS[:1])
    for number in range(8):
        drawn, end = waits[number::8], min(10, 0.1 * 2**number)
        assert len(drawn) == 20
        assert min(drawn) < end / 3
        assert end * 2 / 3 < max(drawn) <= end


def waits_are_noted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waits; the list gets what each would have been."""
    waits: list[float] = []

    async def noted(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("src.rewards.request.sleep", noted)
    return waits


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
    with misbehaving(lambda body: "empty") as server, pytest.raises(RewardError):
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
    for fault in ("401", "500", "echo"):
        with misbehaving(lambda body, fault=fault: fault) as server, pytest.raises(RewardError) as caught:
            reward(server.url, patience=0.05).score(PROMPTS, RESPONSES, ROWS)
        assert "s3cret" not in str(caught.value)
    assert str(caught.value).endswith("status 400: Bearer ... is unknown")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("url", "localhost:8000", "an address that starts with http:// or https://"),
        ("url", "http://", "an address that starts with http:// or https://"),
        ("url", "http://x:port/", "an address that starts with http:// or https://"),
        ("timeout", 0.0, "greater than 0 seconds"),
        ("patience", 0.0, "greater than 0 seconds"),
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


# ------------------------------------------------------------------------- a server that is away, slow, or in the know


def test_a_restart_of_minutes_is_waited_for_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Thirty answers 503, far more than `attempts`: 300 s of patience hold (waits of at most 10 s)."""
    with misbehaving(in_turn(*["503"] * 30)) as server, caplog.at_level("WARNING"):
        assert reward(server.url, attempts=1).score(PROMPTS, RESPONSES, ROWS) == [score_of(text) for text in TEXTS]
    assert caplog.messages == [f"reward server {server.url}: status 503: says why; asked again for 300 s"]


def test_a_restart_of_minutes_is_waited_for_by_default() -> None:
    run = compose(["reward=http", "reward.url=http://x/"])
    assert run.reward.patience >= 120 > run.reward.timeout  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fault", "least", "most"), [("wait 7", 7, 7), ("wait a date", 5, 8)])
def test_retry_after_is_the_least_wait(fault: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds, or as a date, which the server sets 7 s ahead."""
    waits = waits_are_noted(monkeypatch)
    with misbehaving(in_turn(fault)) as server:
        reward(server.url).score(PROMPTS, RESPONSES, ROWS)
    (wait,) = waits
    assert least <= wait <= most


def test_a_server_that_wants_longer_than_patience_is_not_waited_for() -> None:
    started = time.monotonic()
    with (
        misbehaving(lambda body: "wait 7") as server,
        pytest.raises(RewardError, match=r"1 failed attempts .* status 429"),
    ):
        reward(server.url, patience=5.0).score(PROMPTS, RESPONSES, ROWS)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("fault", ["drips its body", "drips its head"])
def test_the_deadline_of_a_request_holds_end_to_end(fault: str) -> None:
    """Each byte comes long before `timeout`, which every byte would start again if it held for a read alone."""
    started = time.monotonic()
    with misbehaving(lambda body: fault) as server, pytest.raises(RewardError, match=r"no whole answer within 0\.3 s"):
        reward(server.url, timeout=0.3, patience=0.1).score(PROMPTS, RESPONSES, ROWS)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:s3cret@x/", "http://...@x/"),
        ("http://s3cret@x/", "http://...@x/"),
        ("https://me:s3@cret@x/", "https://...@x/"),
        ("http://x/?api_key=s3cret&v=1", "http://x/?api_key=...&v=1"),
        ("http://x/score?v=1&token=s3cret", "http://x/score?v=1&token=..."),
    ],
)
def test_a_password_in_an_address_is_neither_kept_nor_shown(url: str, shown: str) -> None:
    """A run stores its overrides and configuration; an override is refused before anything is composed."""
    assert without_secrets(f"error: {url} is away") == f"error: {shown} is away"
    with pytest.raises(ConfigError, match=re.escape(f"reward server {shown}: a password or key in an address")):
        reward(url)
    for override in (f"reward.url={url}", f"reward.url='{url}'", f"+reward.parts.mine.url='{url}'"):
        with pytest.raises(ConfigError, match=r"^reward\.[a-z.]+: a password or key in an address") as caught:
            compose(["reward=mix" if "parts" in override else "reward=http", override])
        assert "cret" not in str(caught.value)


def test_an_address_without_a_password_is_shown_as_it_is() -> None:
    for url in ("http://x:80/v1?api-version=2&author=me", "https://x/a@b", "http://[::1]:80/"):
        assert without_secrets(url) == url
        assert reward(url).service.url == url


def test_a_whole_header_may_be_in_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "Basic bWU6czNjcmV0")
    with misbehaving(in_turn()) as server:
        reward(server.url).score(PROMPTS, RESPONSES, ROWS)
    assert server.headers[0]["Authorization"] == "Basic bWU6czNjcmV0"


def test_it_can_be_asked_where_an_event_loop_runs() -> None:
    """As in a notebook."""

    async def cell() -> list[float]:
        return reward(server.url).score(PROMPTS, RESPONSES, ROWS)

    with misbehaving(in_turn()) as server:
        assert asyncio.run(cell()) == [score_of(text) for text in TEXTS]
