"""The reward server: what it answers, what it refuses, and that asking it is asking the reward itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from src import serve_reward
from src.errors import RewardError
from src.rewards.function import FunctionReward
from src.rewards.http import HttpReward
from src.rewards.mix import MixReward
from src.rewards.rules import KeywordReward, LengthReward
from src.rewards.vader import Vader
from src.rewards.verifiers import ExactMatch, NumericMatch
from src.serve_reward import build_app
from tests.servers import free_port, serving

ROOT = Path(__file__).parents[1]
PROMPTS = ["The film was", "The film was not", "ночь", "夜 ", "", "A bad"]
RESPONSES = [" good, really good.", " good.", " 🎬 великолепно!", "素晴らしい", "I loved it!", ' film\n\t"quotes" \\ .']
QUERIES = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def client(reward: Any, token: str = "", max_bytes: int = 10**6, label_column: str = "answer") -> TestClient:
    return TestClient(build_app(reward, label_column, token, max_bytes), raise_server_exceptions=False)


def post(reward: Any, **body: Any) -> Any:
    answer = client(reward).post("/", json=body)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["rewards", "scores", "extra_logs"]
    return answer.json()["rewards"]


# ------------------------------------------------------------------------------------------------------ what it answers


@pytest.mark.parametrize(
    "reward", [Vader(), LengthReward(3), KeywordReward(["good", "ночь"])], ids=["vader", "length", "keyword"]
)
def test_scores_are_those_of_the_reward_in_order(reward: Any) -> None:
    """Texts of any script; the prompt in front of a response is no part of it."""
    expected = reward.score(PROMPTS, RESPONSES, [{}] * 6)
    assert len(set(expected)) > 1
    assert post(reward, query=QUERIES, prompts=PROMPTS) == expected
    assert post(reward, query=QUERIES[::-1], prompts=PROMPTS[::-1]) == expected[::-1]


def test_without_prompts_the_whole_text_is_the_response() -> None:
    reward = LengthReward(3)
    expected = reward.score([""] * 6, QUERIES, [{}] * 6)
    assert expected != reward.score(PROMPTS, RESPONSES, [{}] * 6)
    assert post(reward, query=QUERIES) == post(reward, query=QUERIES, prompts=None, labels=None) == expected


def test_a_text_that_does_not_begin_with_its_prompt_is_taken_whole() -> None:
    assert post(LengthReward(1), query=["one two", "one two"], prompts=["one ", "two "]) == [0.0, -1.0]


@pytest.mark.parametrize("label_column", ["answer", "gold"])
def test_labels_reach_a_verifier_as_its_column(label_column: str) -> None:
    body = {"query": ["2+2= 4", "2+3= 4", "2+2=4"], "prompts": ["2+2=", "2+3=", "2+2="], "labels": [4, 5, "4"]}
    for reward in (ExactMatch(label_column), NumericMatch(label_column, "", 0.0)):
        assert client(reward, label_column=label_column).post("/", json=body).json()["rewards"] == [1.0, 0.0, 1.0]


def test_health() -> None:
    assert client(Vader()).get("/health").json() == {"status": "ok"}


# ------------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": []},
        {"query": None},
        {"query": "a text"},
        {"query": [1, 2]},
        {"query": ["a", None]},
        {"query": ["a", "b"], "prompts": ["a"]},
        {"query": ["a"], "prompts": ["a", "b"]},
        {"query": ["a"], "prompts": "a"},
        {"query": ["a"], "prompts": [1]},
        {"query": ["a", "b"], "labels": []},
        {"query": ["a"], "labels": "a"},
        ["a"],
        "a",
    ],
    ids=str,
)
def test_a_body_that_is_no_question_is_refused(body: Any) -> None:
    assert client(Vader()).post("/", json=body).status_code == 422


def test_what_is_no_json_is_refused() -> None:
    for content in (b"", b"query", b'{"query": ["a"', b"\xff\xfe"):
        answer = client(Vader()).post("/", content=content, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, content


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/", 405), ("/docs", 200)])
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crets", "s3cret", "bearer S3cret", "Bearer é"]
)
def test_without_the_token_nothing_is_said(path: str, status: int, given: str | None) -> None:
    """Not even that the server is up; and another script in the header is a wrong token like any other."""
    server = client(Vader(), token="s3cret")
    headers = {} if given is None else {"Authorization": given.encode()}
    answer = server.get(path, headers=headers)
    assert (answer.status_code, answer.text) == (401, "a bearer token is needed")
    assert server.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == status


@pytest.mark.parametrize("token", ["s3cret", "tök"])
def test_with_the_token_everything_is(token: str) -> None:
    server, headers = client(Vader(), token=token), {"Authorization": f"Bearer {token}".encode()}
    assert server.post("/", json={"query": ["A good film."]}).status_code == 401
    answer = server.post("/", json={"query": ["A good film."]}, headers=headers)
    assert answer.json()["rewards"] == Vader().score([""], ["A good film."], [{}])


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(chunked: bool) -> None:
    """By the bytes that come, whatever Content-Length says or whether there is one; the limit itself is allowed."""
    with serving(build_app(LengthReward(1), "answer", "", 1000)) as url, httpx.Client() as real:
        for size, status in ((1000, 200), (1001, 413), (3_000_000, 413)):
            body = b'{"query": ["' + b"x" * (size - 15) + b'"]}'
            assert len(body) == size
            pieces = (body[start : start + 700] for start in range(0, size, 700))
            answer = real.post(url, content=pieces if chunked else body, headers={"content-type": "application/json"})
            assert ("content-length" in answer.request.headers) != chunked
            assert answer.status_code == status
            assert status == 200 or answer.text == "the body has more than 1000 bytes"


def test_a_reward_that_raises_says_why_and_is_not_asked_again_for_minutes() -> None:
    """And the next question is answered."""

    def picky(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [1 / len(response) for response in responses]

    server = client(FunctionReward("picky", picky))
    answer = server.post("/", json={"query": ["ab", ""]})
    assert answer.status_code == 422
    assert "ZeroDivisionError" in answer.json()["detail"]
    assert server.post("/", json={"query": ["ab"]}).json()["rewards"] == [0.5]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_is_an_error_with_its_text_and_not_null(wrong: float) -> None:
    def broken(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [0.5, wrong][: len(responses)]

    with serving(build_app(FunctionReward("broken", broken), "answer", "", 10**6)) as url:
        asked = HttpReward(url, 30.0, 300.0, 5, 4, 2, "answer", "REWARD_TOKEN")
        with pytest.raises(RewardError, match=rf"status 422: .*the reward gave {wrong} for 'second'; a score must be"):
            asked.score(["", ""], ["first", "second"], [{}, {}])


def test_a_wrong_number_of_scores_is_an_error() -> None:
    answer = client(FunctionReward("one", lambda p, r, m: [0.5])).post("/", json={"query": ["a", "b"]})
    assert (answer.status_code, answer.json()["detail"]) == (422, "the reward gave 1 scores for 2 queries")


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs the entry with these arguments; returns what uvicorn was asked to serve."""
    served: dict[str, Any] = {}
    monkeypatch.setattr(serve_reward, "set_up_output", lambda: None)
    monkeypatch.setattr(serve_reward.uvicorn, "run", lambda app, **options: served.update(options, app=app))

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["serve_reward", *arguments])
        serve_reward.main()
        return served

    return run


def test_others_are_served_with_a_token_only(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7"):
        with pytest.raises(SystemExit) as stopped:
            command("reward=vader", "--host", host)
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            f"error: --host {host}: other machines can reach it, so it needs a token: set REWARD_TOKEN\n",
        )
    monkeypatch.setenv("REWARD_TOKEN", "s3cret\n")
    served = command("reward=vader", "--host", "0.0.0.0", "--port", "8123")
    assert (served["host"], served["port"]) == ("0.0.0.0", 8123)
    with TestClient(served["app"]) as asked:
        assert asked.get("/health").status_code == 401
        assert asked.get("/health", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_overrides_and_options_stand_in_any_order(command: Any) -> None:
    arguments = ["reward=exact_match", "--label-column", "gold", "reward.answer_column=gold", "--max-bytes", "100"]
    served = command(*arguments)
    assert served["host"] == "127.0.0.1"
    with TestClient(served["app"]) as asked:
        body = {"query": ["a"], "labels": ["a"]}
        assert asked.post("/", json=body).json()["rewards"] == [1.0]
        assert asked.post("/", json={"query": ["a" * 100]}).status_code == 413


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["reward=nope"], "error: reward=nope: there is no such option; the options are adapter, exact_match, "),
        (["reward=keyword"], "error: reward.keywords must be given with these choices: add reward.keywords=..."),
        (["reward=regex", "reward.pattern='('"], "error: reward.pattern='(': must be a regular expression of"),
        (["reward=learned", "reward.path=/no/such"], "error: no usable model at '/no/such': "),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(
    command: Any, overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(*overrides)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(sentence)
    assert err.count("\n") == 1


@pytest.mark.slow
def test_as_a_process_it_serves_until_it_is_told_to_stop() -> None:
    port = free_port()
    words = [sys.executable, "-m", "src.serve_reward", "reward=vader", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "REWARD_TOKEN": ""}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(1200):
            assert process.poll() is None, process.communicate()[1]
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        reward = HttpReward(f"http://127.0.0.1:{port}", 30.0, 5.0, 1, 4, 2, "answer", "REWARD_TOKEN")
        scores = reward.score(PROMPTS, RESPONSES, [{}] * 6)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert scores == Vader().score(PROMPTS, RESPONSES, [{}] * 6)


def test_an_adapter_on_a_policy_s_base_is_not_served(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("reward=adapter")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: reward=adapter needs a policy's base: serve reward=learned")


def test_a_port_that_is_taken_is_said_in_one_sentence(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            command("reward=vader", "--port", str(port))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port} (Address already in use): choose another with" in err
    assert err.count("\n") == 1


def test_the_parts_of_a_reward_arrive_by_name_and_are_parts_again() -> None:
    """`scores` are the rewards; each part is a list in `extra_logs`, and `reward=http` reads all of them."""
    mixed = MixReward({"words": LengthReward(2), "good": KeywordReward(["good"])}, {"words": 1.0, "good": 3.0})
    prompts, responses, rows = ["a ", "b "], ["good film", "bad"], [{}, {}]
    queries = [p + r for p, r in zip(prompts, responses, strict=True)]
    answer = client(mixed).post("/", json={"query": queries, "prompts": prompts}).json()
    expected = {name: part.tolist() for name, part in mixed.score_parts(prompts, responses, rows).items()}
    assert answer["extra_logs"] == expected
    assert answer["scores"] == answer["rewards"] == mixed.score(prompts, responses, rows).tolist()
    with serving(build_app(mixed, "answer", "", 2**20)) as url:
        parts = HttpReward(url, 30.0, 5.0, 1, 4, 1, "answer", "REWARD_TOKEN").score_parts(prompts, responses, rows)
    given = {"scores": answer["rewards"], "rewards": answer["rewards"]}
    assert {name: part.tolist() for name, part in parts.items()} == expected | given
