"""A language model as the reward, against a server that answers well, badly, slowly and not at all."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import wait_none

from src.config.compose import compose
from src.errors import ConfigError, RewardError, SettingError
from src.rewards.judge import Judge, PairwiseJudge, outcomes
from src.rollout.scoring import Scorer
from src.stages.builders import stage_of
from src.types import PartedReward
from tests.servers import free_port, up
from tests.tiny import ragged_rollout

Says = Callable[[str], Any]  # question -> the text of the answer, a whole body, a status, or None for silence
ROWS: list[dict[str, Any]] = [{}, {}, {}]
ASKED = ["why?"] * 3, ["because 7 .", "no 3 .", "it is so 10 ."], ROWS


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait_random_exponential", lambda **_: wait_none())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, says: Says) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says, self.over = says, threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/chat/completions"

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.tokens.add(self.headers["Authorization"])
        given = self.server.says(body["messages"][0]["content"])
        if given is None:
            self.server.over.wait(30)
            return
        content = completion(given) if isinstance(given, str) else given
        data = json.dumps(content).encode()
        self.send_response(given if isinstance(given, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text, **message}}], "usage": {"total_tokens": 11}}


def endpoint(says: Says) -> AbstractContextManager[Endpoint]:
    return up(Endpoint(says))


def judge(url: str, option: str = "judge", **changes: Any) -> Any:
    """The reward of an option file, with these settings."""
    node = compose([f"reward={option}", "reward.model=x"]).plain()["reward"]
    kind = {"judge": Judge, "judge_pairs": PairwiseJudge}[option]
    given = {"url": url, "model": "wise", "patience": 3.0} | changes
    return kind(**({key: value for key, value in node.items() if key != "_target_"} | given))


def number_in(question: str) -> str:
    """The mark that a good judge gives: the number in the response."""
    response = question.split("[Response]\n")[1].split("\n\n[End]")[0]
    return f"Thinking: I would not say score: 99. \nScore: **{re.findall(r'[0-9]+', response)[-1]}**"


def in_order(*answers: Any) -> Says:
    left = list(answers)
    return lambda question: left.pop(0) if left else number_in(question)


# ------------------------------------------------------------------------------------------------------------- marks


def test_marks_are_moved_to_0_and_1_and_cost_is_shown() -> None:
    """(mark - 1) / 9 for marks from 1 to 10; the last match counts; 3 questions of 11 tokens: 1 and 11 for each."""
    with endpoint(number_in) as server:
        asked = judge(server.url)
        parts = asked.score_parts(*ASKED)
        assert isinstance(asked, PartedReward)
    assert parts["mark"].tolist() == [7, 3, 10]
    assert asked.combine(parts).tolist() == pytest.approx([6 / 9, 2 / 9, 1])
    assert parts["requests"].tolist() == [1, 1, 1]
    assert parts["tokens"].tolist() == [11, 11, 11]
    assert server.tokens == {"Bearer s3cret"}
    (body,) = [body for body in server.bodies if "because" in body["messages"][0]["content"]]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("wise", 0.0, 512)
    for text in ("why?", "because 7 .", "helpful, correct", "from 1 to 10"):
        assert text in body["messages"][0]["content"]


BAD = {
    "prose": "It is rather good.",
    "out of range": "Score: 11",
    "below": "Score: -1",
    "thousands": "Score: 1,000",
    "a word": "Score: ten",
    "refusal": completion(None, refusal="I cannot rate this"),
    "no text": completion(None),
    "no choices": {"choices": []},
    "an error": {"error": "busy"},
    "a list": [1],
    "refused by status": 400,
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_answer_is_never_a_score(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """To one response: it alone has no score, which the run's rule for failed samples handles. To all: one sentence."""
    with endpoint(lambda question: BAD[fault] if "no 3" in question else number_in(question)) as server:
        scores = judge(server.url).score(*ASKED)
        assert scores.isnan().tolist() == [False, True, False]
        assert len(server.bodies) == (3 if fault == "refused by status" else 4)  # attempts: 2
    assert caplog.messages[-1].startswith("1 of 3 questions have no usable answer; the first: judge http")
    with endpoint(lambda question: BAD[fault]) as server, pytest.raises(RewardError, match=r"^judge http"):
        judge(server.url).score(*ASKED)


def test_a_failed_sample_follows_the_runs_rule() -> None:
    rollout = ragged_rollout(3)
    says = lambda question: "no idea" if "r1" in question else number_in(question)  # noqa: E731
    with endpoint(says) as server:
        scored = Scorer(drop_failed=True).score(judge(server.url, lowest=0.0), rollout)
        assert (scored.dropped, scored.rollout.responses) == (1, ("r0", "r2"))
        assert scored.parts["mark"].tolist() == [0, 2]
        with pytest.raises(RewardError, match="reward Judge gave nan for prompt 'p1', response 'r1'"):
            Scorer().score(judge(server.url, lowest=0.0), rollout)


def test_a_bad_answer_is_asked_again_and_paid_for() -> None:
    with endpoint(in_order("no idea")) as server:
        parts = judge(server.url, concurrency=1).score_parts(*ASKED)
    assert parts["mark"].tolist() == [7, 3, 10]
    assert parts["requests"].sum() == pytest.approx(4)
    assert parts["tokens"].sum() == pytest.approx(44)


def test_a_slow_judge_is_bounded_and_one_that_is_not_there_ends_in_a_sentence() -> None:
    with endpoint(lambda question: None) as server, pytest.raises(RewardError, match=r"no whole answer within 0\.1 s"):
        judge(server.url, timeout=0.1, patience=0.15).score(*ASKED)
    with endpoint(in_order(None)) as server:
        assert judge(server.url, timeout=0.2, concurrency=1).score(*ASKED).isfinite().all()
    with pytest.raises(RewardError, match=r"^judge http://127.0.0.1:\d+/: \d+ failed attempts for the question that"):
        judge(f"http://127.0.0.1:{free_port()}/", patience=0.05).score(*ASKED)
    with endpoint(lambda question: 401) as server, pytest.raises(RewardError, match="status 401"):
        judge(server.url, concurrency=1).score(*ASKED)
    assert len(server.bodies) == 1


def test_equal_questions_are_paid_for_once_also_by_the_next_run(tmp_path: Path) -> None:
    """In the process without a file; with one also later. A killed run's half line is cut off, other lines refused."""
    twice = ["why?"] * 2, ["so 7 .", "so 7 ."], [{}, {}]
    cache = tmp_path / "new" / "answers.jsonl"
    with endpoint(number_in) as server:
        first = judge(server.url, cache=str(cache))
        assert first.score(*twice).tolist() == pytest.approx([6 / 9] * 2)
        assert first.score_parts(*twice)["requests"].tolist() == [0, 0]
        whole = cache.read_bytes()
        cache.write_bytes(whole + b'{"question": "')
        later = judge(server.url, cache=str(cache))
        assert cache.read_bytes() == whole
        assert later.score(*twice).tolist() == pytest.approx([6 / 9] * 2)
        assert len(server.bodies) == 1
        judge(server.url, cache=str(cache), model="other").score(*twice)
        assert len(server.bodies) == 2
    cache.write_text('{"score": 1}\n')
    with pytest.raises(ConfigError, match=r"answers.jsonl, line 1: not an answer that was kept"):
        judge("http://x/", cache=str(cache))


def test_a_template_may_name_columns_and_braces_of_a_response_stay(tmp_path: Path) -> None:
    file = tmp_path / "mark.txt"
    file.write_text('Right is {answer}. {"a": {prompt}} said {response}.\n\n[Response]\n1\n\n[End]')
    with endpoint(number_in) as server:
        judge(server.url, template=str(file)).score(["{response}"], ["{prompt} {x}"], [{"answer": 5}])
        assert server.questions == ['Right is 5. {"a": {response}} said {prompt} {x}.\n\n[Response]\n1\n\n[End]']
        with pytest.raises(RewardError, match=r"\{answer\} is no column; there are highest, lowest, prompt"):
            judge(server.url, template=str(file)).score(["p"], ["r"], [{}])
    file.write_text("{prompt}")
    with pytest.raises(ConfigError, match=r"no place \{response\}"):
        judge("http://x/", template=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        judge("http://x/", template=str(tmp_path / "none"))


def test_settings_that_cannot_work_are_refused() -> None:
    for change in ({"highest": 1.0}, {"temperature": -1.0}, {"max_tokens": 0}, {"pattern": "x"}, {"url": "x"}):
        with pytest.raises(SettingError) as caught:
            judge(**({"url": "http://x/"} | change))
        assert caught.value.name == next(iter(change))


# ------------------------------------------------------------------------------------------------------------- pairs


def pair_in(question: str) -> tuple[str, str]:
    first, second = re.findall(r"\[Response [AB]\]\n(.*?)\n\n(?=\[)", question, re.DOTALL)
    return first, second


def by_order(*best_first: str) -> Says:
    """A judge that prefers the earlier one of a list, in whichever place it stands."""

    def says(question: str) -> str:
        first, second = pair_in(question)
        return f"Better: {'A' if best_first.index(first) < best_first.index(second) else 'B'}"

    return says


def compared(says: Says, *responses: str) -> dict[str, torch.Tensor]:
    with endpoint(says) as server:
        count = len(responses)
        return dict(judge(server.url, "judge_pairs").score_parts(["why?"] * count, list(responses), [{}] * count))


@pytest.mark.parametrize("responses", list(permutations("abc")))
def test_a_judge_with_an_order_gives_it_back(responses: tuple[str, ...]) -> None:
    """The best of three wins both comparisons, the second one, the last none; six questions of 11 tokens."""
    parts = compared(by_order("a", "b", "c"), *responses)
    assert parts["won"].tolist() == [{"a": 1, "b": 0.5, "c": 0}[r] for r in responses]
    for name in ("ties", "contradicted", "cycles"):
        assert parts[name].tolist() == [0, 0, 0]
    assert parts["requests"].sum() == pytest.approx(6)
    assert parts["tokens"].sum() == pytest.approx(66)


def test_a_circle_gives_its_responses_the_same_score_and_is_counted() -> None:
    """a beats b beats c beats a, all beat d: two of three comparisons each; one triple of three is a circle."""
    beats = {("a", "b"), ("b", "c"), ("c", "a"), ("a", "d"), ("b", "d"), ("c", "d")}
    parts = compared(lambda q: f"Better: {'A' if pair_in(q) in beats else 'B'}", "a", "b", "c", "d")
    assert parts["won"].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])
    assert parts["cycles"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_a_judge_that_prefers_a_place_decides_nothing() -> None:
    parts = compared(lambda question: "Better: A", "a", "b")
    assert (parts["won"].tolist(), parts["contradicted"].tolist(), parts["ties"].tolist()) == (
        [0.5] * 2,
        [1, 1],
        [1, 1],
    )


def test_ties_and_equal_responses_are_worth_a_half() -> None:
    with endpoint(lambda question: "Better: tie") as server:
        parts = judge(server.url, "judge_pairs").score_parts(["why?"] * 3, ["a", "a", "b"], ROWS)
        assert len(server.bodies) == 2  # a with b and b with a, once each
    assert parts["won"].tolist() == [0.5] * 3
    assert parts["ties"].tolist() == [1, 1, 1]
    assert parts["contradicted"].tolist() == [0, 0, 0]


def test_groups_are_apart_and_a_comparison_without_an_answer_fails_its_two_responses() -> None:
    def says(question: str) -> str:
        return "no idea" if set(pair_in(question)) == {"a", "b"} else by_order("x", "a", "b", "c")(question)

    with endpoint(says) as server:
        won = judge(server.url, "judge_pairs").score(["p", "q", "p", "p", "q"], ["a", "c", "b", "c", "x"], [{}] * 5)
    assert won.isnan().tolist() == [True, False, True, False, False]
    assert won[[1, 3, 4]].tolist() == [0, 0, 1]


def test_a_response_alone_has_won_a_half_and_is_not_asked_about() -> None:
    with endpoint(by_order("a", "b")) as server:
        won = judge(server.url, "judge_pairs").score(["p", "p", "q"], ["a", "b", "c"], ROWS)
    assert won.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("", "rollout.samples_per_prompt=1: reward=judge_pairs compares the responses to a prompt: at least 2"),
        ("rollout.samples_per_prompt=4 trainer=ddp", "compares responses within a process"),
        ("rollout.samples_per_prompt=4 advantage=remax", "advantage=remax scores one response to a prompt"),
        (
            "rollout.samples_per_prompt=4 ppo.held_out.every=5 ppo.held_out.best=score",
            "ppo.held_out.best=score scores one",
        ),
    ],
)
def test_what_cannot_be_compared_in_pairs_is_refused_before_anything_is_loaded(overrides: str, sentence: str) -> None:
    given = ["reward=judge_pairs", "reward.url=http://x/", "reward.model=m", *overrides.split()]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        stage_of(compose(given)).check()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_and_circles_by_a_loop(count: int) -> None:
    draws = torch.Generator().manual_seed(count)
    upper = torch.randint(0, 3, (count, count), generator=draws).triu(1) / 2
    wins = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(count)
    found = outcomes(wins, torch.zeros(count, count))
    for i in range(count):
        others = [j for j in range(count) if j != i]
        assert found["won"][i] == pytest.approx(sum(wins[i, j].item() for j in others) / len(others))
        triples = [(j, k) for j, k in permutations(others, 2) if j < k]
        circles = [
            (j, k)
            for j, k in triples
            if all(wins[a, b] > 0.5 for a, b in ((i, j), (j, k), (k, i)))
            or all(wins[a, b] > 0.5 for a, b in ((i, k), (k, j), (j, i)))
        ]
        assert found["cycles"][i] == pytest.approx(len(circles) / max(1, len(triples)))
