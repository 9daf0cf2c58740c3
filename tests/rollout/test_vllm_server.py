"""Rollouts from servers that misbehave on purpose: no prompt is lost or answered twice, none by other weights."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import wait_none

from src.checkpointing.checkpoint import checkpoints
from src.config.compose import compose
from src.errors import ConfigError, EngineError
from src.models.roles import Roles
from src.rollout.answering import Responses
from src.rollout.engines.rows import token_rows
from src.rollout.engines.vllm_server import VLLMServers
from src.rollout.sampling import Sampler
from src.runs.start import start
from src.stages.ppo import PPOStage
from src.utils.distributed import RowShard, row_shard
from tests.conftest import TINY_RUN
from tests.rollout_servers import FAULTS, RolloutServer, Says, serving_rollouts
from tests.servers import free_port, misbehaving
from tests.tiny import (
    FOREIGN_WARNINGS,
    PROMPTS,
    assert_rows_close,
    make_prompts,
    make_roles,
    plain_logprobs,
    plain_model,
    rows_of,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

SAMPLER = Sampler(max_new_tokens=6, temperature=0.7)
PROMPTS = PROMPTS[:5]
ROWS = make_prompts(PROMPTS)
RETRIED = [name for name in FAULTS if name not in ("ok", "hang", "die", "restart")]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait_random_exponential", lambda **_: wait_none())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return make_roles(write_lm(tmp_path_factory.mktemp("lm")), spread=0.3)


def engine(*urls: str, **changes: Any) -> VLLMServers:
    plain = {"folder": None, "timeout": 20.0, "patience": 20.0, "attempts": 3, "concurrency": 2}
    return VLLMServers(40, 8, urls=list(urls), **(plain | changes))


def drawn(roles: Roles, *servers: RolloutServer, seed: int = 2, **changes: Any) -> Responses:
    asked = engine(*(server.url for server in servers), **changes)
    with serving_rollouts(*servers):
        try:
            asked.take(roles, 0)
            return asked.sample(roles, ROWS, SAMPLER, torch.Generator().manual_seed(seed), row_shard(len(PROMPTS)))
        finally:
            asked.close()


def same(one: Responses, other: Responses) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def expected(roles: Roles) -> Responses:
    """From one server without a fault."""
    return drawn(roles, RolloutServer(roles))


def first(*numbers: int, fault: str) -> Says:
    return lambda n: fault if n in numbers else "ok"


# ------------------------------------------------------------------------------------------------- what is drawn


def test_responses_are_those_of_the_policy(roles: Roles, expected: Responses) -> None:
    """Log-probabilities, at the temperature, by whole forwards of a plain copy; ended rows end with an end token."""
    ids, mask, logprobs, finished = expected
    rollout = as_rollout(roles, expected)
    assert_rows_close(rows_of(logprobs, mask), plain_logprobs(plain_model(roles, "policy"), rollout, 0.7), 1e-5)
    last = ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert finished.tolist() == [token in roles.endings.ids for token in last.tolist()]
    assert 0 < finished.sum() < len(finished)
    assert not logprobs[~mask].any()
    assert (ids[~mask] == roles.tokenizer.pad_token_id).all()


def as_rollout(roles: Roles, responses: Responses) -> Any:
    from src.rollout.answering import as_rollout

    return as_rollout(roles, ROWS, responses, 0)


def test_they_depend_on_the_seed_alone(roles: Roles, expected: Responses) -> None:
    """Not on the number of servers, nor on the rows that other ranks ask for."""
    assert same(drawn(roles, *(RolloutServer(roles) for _ in range(3))), expected)
    assert not same(drawn(roles, RolloutServer(roles), seed=0), expected)
    server = RolloutServer(roles)
    asked, share = engine(server.url), RowShard(torch.tensor([2, 4]), len(PROMPTS))
    with serving_rollouts(server):
        asked.take(roles, 0)
        ids, mask, *_ = asked.sample(roles, ROWS, SAMPLER, torch.Generator().manual_seed(2), share)
    asked.close()
    whole = rows_of(expected[0], expected[1])
    assert rows_of(ids, mask) == [whole[2], whole[4]]


def test_every_batch_is_drawn_from_the_weights_as_they_are_then(tmp_path: Path) -> None:
    roles = make_roles(write_lm(tmp_path / "lm"), spread=0.3)
    servers = [RolloutServer(roles) for _ in range(2)]
    asked = engine(*(server.url for server in servers), folder=str(tmp_path / "weights"))
    with serving_rollouts(*servers):
        for version in range(3):
            asked.take(roles, version)
            (kept,) = (tmp_path / "weights").glob("*/*")
            assert all(server.given[version:] == [kept.name] for server in servers)
            draws = torch.Generator().manual_seed(version)
            answer = asked.sample(roles, ROWS, SAMPLER, draws, row_shard(len(PROMPTS)))
            plain = plain_logprobs(plain_model(roles, "policy"), as_rollout(roles, answer), 0.7)
            assert_rows_close(rows_of(answer[2], answer[1]), plain, 1e-5)
            with torch.no_grad():
                for parameter in roles.policy_parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    asked.close()
    assert not list((tmp_path / "weights").iterdir())


# --------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("fault", ["hang up", "500", "half"])
def test_what_one_server_does_wrong_another_does_right(fault: str, roles: Roles, expected: Responses) -> None:
    bad, good = RolloutServer(roles, lambda n: fault), RolloutServer(roles)
    assert same(drawn(roles, bad, good), expected)
    assert 1 <= len(bad.prompts) <= 2  # its rows under way; then it is left out
    assert_once(roles, good.prompts)


def assert_once(roles: Roles, answered: list[list[int]]) -> None:
    assert Counter(map(tuple, answered)) == Counter(map(tuple, token_rows(ROWS, row_shard(len(PROMPTS)))))


def test_a_server_alone_is_asked_again_after_every_fault(roles: Roles, expected: Responses) -> None:
    server = RolloutServer(roles, lambda n: RETRIED[n] if n < len(RETRIED) else "ok")
    assert same(drawn(roles, server, concurrency=1, attempts=len(RETRIED) + 1), expected)
    assert len(server.prompts) == len(PROMPTS) + len(RETRIED)


@pytest.mark.parametrize("fault", ["hang up", "other tokens"])
def test_what_no_server_does_right_ends_in_one_sentence(fault: str, roles: Roles) -> None:
    servers = [RolloutServer(roles, lambda n: fault) for _ in range(2)]
    with pytest.raises(
        EngineError,
        match=r"^rollout server http://\S+: \S.* \(2 failed attempts for a prompt of \d tokens\)$",
    ):
        drawn(roles, *servers, attempts=2)
    assert max(Counter(map(tuple, servers[0].prompts + servers[1].prompts)).values()) == 2


def test_a_server_that_hangs_costs_its_time_once(roles: Roles, expected: Responses) -> None:
    bad, good = RolloutServer(roles, lambda n: "hang"), RolloutServer(roles)
    started = time.monotonic()
    assert same(drawn(roles, bad, good, timeout=0.5), expected)
    assert time.monotonic() - started < 5
    assert len(bad.prompts) == 2


@pytest.mark.parametrize("fault", ["die", "restart"])
def test_a_server_that_dies_or_comes_back_with_other_weights(fault: str, roles: Roles, expected: Responses) -> None:
    """In the middle of its rows: what it had answered is not confirmed, so all of it is drawn elsewhere, once."""
    bad, good = RolloutServer(roles, first(1, fault=fault)), RolloutServer(roles)
    assert same(drawn(roles, bad, good), expected)
    assert len(bad.prompts) >= 2
    assert_once(roles, good.prompts)


def test_a_lost_server_is_back_with_the_next_weights(roles: Roles, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = RolloutServer(roles, first(0, fault="500")), RolloutServer(roles)
    asked = engine(bad.url, good.url)
    with serving_rollouts(bad, good), caplog.at_level("WARNING"):
        for version in range(2):
            asked.take(roles, version)
            asked.sample(roles, ROWS, SAMPLER, torch.Generator().manual_seed(2), row_shard(len(PROMPTS)))
    asked.close()
    assert len(bad.prompts) > 2
    assert bad.given == good.given
    assert [message.partition(": ")[0] for message in caplog.messages] == [f"rollout server {bad.url}"]


def test_a_server_that_was_away_gets_the_weights_when_it_is_back(roles: Roles, expected: Responses) -> None:
    """Not there when they were given out, it is asked what it serves before its first prompt."""
    there, away = RolloutServer(roles), free_port()
    asked = engine(there.url, f"http://127.0.0.1:{away}")
    with serving_rollouts(there):
        asked.take(roles, 0)
        late = RolloutServer(roles, port=away)
        with serving_rollouts(late):
            draws = torch.Generator().manual_seed(2)
            assert same(asked.sample(roles, ROWS, SAMPLER, draws, row_shard(len(PROMPTS))), expected)
    asked.close()
    assert late.given == there.given
    assert late.prompts


def test_servers_that_two_runs_share_never_mix_their_weights(roles: Roles) -> None:
    """Another run gives its weights to the only server before every answer: none of the answers counts."""
    server = RolloutServer(roles)

    def stolen(_: int) -> str:
        server.serves = "another run's"
        return "ok"

    server.says = stolen
    with pytest.raises(EngineError, match=r"given other weights"):
        drawn(roles, server, attempts=2)


def test_nobody_is_there(roles: Roles) -> None:
    """All are asked for `patience` seconds."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    started, asked = time.monotonic(), engine(*urls, patience=0.3)
    with pytest.raises(EngineError, match=rf"^no rollout server answers \({urls[0]}: .*{urls[1]}: .*\); start it by"):
        asked.take(roles, 0)
    asked.close()
    assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"vllm": "0.33.0"}, "its version of vLLM is 0.33.0, that of this run 0.32.0"),
        ({"code": "0" * 64}, "its version of this repository is 000000000000, that of this run "),
        ({"logprobs": "raw_logprobs"}, "its kind of log-probabilities is raw_logprobs, "),
        ({"dtype": "bfloat16"}, "its dtype is bfloat16, that of this run float32"),
        ({"tokenizer": "0" * 64}, "its tokenizer gives other ids to tokens than that of this run"),
        ({"context": 47}, "it reads 47 tokens, and this run needs 48"),
    ],
)
def test_another_server_is_refused_before_the_first_prompt(described: Any, said: str, roles: Roles) -> None:
    other, right = RolloutServer(roles, **described), RolloutServer(roles)
    with pytest.raises(EngineError, match=f"^rollout server {other.url}: {re.escape(said)}"):
        drawn(roles, right, other)
    assert [*other.prompts, *right.prompts, *other.given] == []


def test_another_model_is_refused_by_the_first_key_that_differs(roles: Roles, tmp_path: Path) -> None:
    other = RolloutServer(make_roles(write_lm(tmp_path, n_layer=3)))
    with pytest.raises(EngineError, match="its model has n_layer=3, that of this run 2; start it by `python -m src"):
        drawn(roles, other)


def test_what_is_no_rollout_server_is_refused(roles: Roles) -> None:
    with misbehaving(lambda body: "404") as server:
        server.RequestHandlerClass.do_POST = lambda h: h.answer("says why", 404)  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match=r"status 404: says why; start it by `python -m src\.serve_rollout"):
            engine(server.url.rstrip("/")).take(roles, 0)


def test_weights_that_cannot_be_written_are_said(roles: Roles, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"^the policy's weights cannot be written for the rollout engine: .*file"):
        engine("http://127.0.0.1:1", folder=str(tmp_path / "file")).take(roles, 0)


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ("[]", r"^rollout\.engine\.urls=\[\]: must be one address or several different ones"),
        ("[localhost:8000]", r"^rollout\.engine\.urls='localhost:8000': must be addresses that start with http"),
        ("[http://x,http://x]", r"several different ones"),
        ("[http://me:s3cret@x]", r"password or key in an address"),
    ],
)
def test_addresses_that_cannot_be_are_refused_at_the_start(urls: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PPOStage(compose(["engine=vllm_server", f"rollout.engine.urls={urls}", "reward=vader"]))
    assert "s3cret" not in str(caught.value)


@pytest.mark.slow
def test_a_run_without_servers_keeps_its_checkpoint_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """The only server dies in the second of three batches; once it is back the run ends as a whole one, bit for bit."""
    base, port = write_lm(tmp_path / "lm"), free_port()
    described = make_roles(base)

    def run(name: str, says: Says = lambda n: "ok") -> Path:
        server = RolloutServer(described, says, port)
        more = [f"model.path={base}", f"log_dir={tmp_path}", f"name={name}", "ppo.num_iterations=3"]
        with serving_rollouts(server):
            url = f"rollout.engine.urls=[{server.url}]"
            start([*TINY_RUN, *more, "engine=vllm_server", url, "rollout.engine.patience=0.2"])
        return tmp_path / "ppo" / name

    with pytest.raises(EngineError, match=r"^no rollout server answers"):
        run("cut", lambda n: "die" if n == 11 else "ok")
    assert [path.stem for path in checkpoints(tmp_path / "ppo" / "cut" / "checkpoints")] == ["iteration-1"]
    whole, resumed = (run(name) / "model" / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == resumed.read_bytes()
