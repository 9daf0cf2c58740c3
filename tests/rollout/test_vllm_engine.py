"""vLLM in a child process, where a stand-in with vLLM's interface plays it: what is asked, and what is made of it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import GPT2LMHeadModel

from src.config.compose import compose
from src.errors import ConfigError, EngineError
from src.models.roles import Roles
from src.rollout.answering import Responses, as_rollout
from src.rollout.engines import vllm, vllm_options
from src.rollout.engines.vllm import VLLMEngine
from src.rollout.sampling import Sampler
from src.stages.ppo import PPOStage
from src.utils.distributed import row_shard
from tests.tiny import (
    FOREIGN_WARNINGS,
    assert_rows_close,
    make_prompts,
    make_roles,
    plain_logprobs,
    plain_model,
    rows_of,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

SAMPLER, ROWS = Sampler(max_new_tokens=5, temperature=0.8), make_prompts(["the film", "a", "we liked the plot"])


class FakeLLM:
    """Draws with the model of a folder; keeps how it was started and what it was asked."""

    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, model: str, **arguments: Any) -> None:
        self.arguments, self.environment = arguments, dict(os.environ)
        self.asked: list[Any] = []
        self.ended = False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        FakeLLM.made.append(self)

    def shutdown(self) -> None:
        self.ended = True

    def collective_rpc(self, method: str, args: tuple[str, str]) -> None:
        assert method == "take_policy"
        self.lm, self.name = GPT2LMHeadModel.from_pretrained(args[0]).eval(), args[1]

    def generate(self, prompts: list[dict[str, Any]], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked.append(prompts)
        return [self.answer(prompt, given) for prompt, given in zip(prompts, parameters, strict=True)]

    def answer(self, prompt: dict[str, Any], given: Any) -> Any:
        assert prompt["cache_salt"] == self.name
        ids, stop = torch.tensor([prompt["prompt_token_ids"]]), torch.tensor(given.stop_token_ids)
        sampler, draws = Sampler(given.max_tokens, given.temperature), torch.Generator().manual_seed(given.seed)
        ids, mask, logprobs, _ = sampler.sample(self.lm, ids, torch.ones_like(ids).bool(), stop, 0, draws)
        tokens, numbers = ids[mask].tolist(), logprobs[mask].tolist()
        given_logprobs = [{t: SimpleNamespace(logprob=x)} for t, x in zip(tokens, numbers, strict=True)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=given_logprobs)])


@dataclass
class FakeParameters:
    """The settings of vLLM's `SamplingParams` that are given."""

    temperature: float
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool
    top_p: float
    top_k: int
    min_p: float
    min_tokens: int
    repetition_penalty: float
    n: int


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm, "refuse_heads", lambda config: None)
    monkeypatch.setattr(FakeLLM, "made", [])


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    return make_roles(write_lm(tmp_path / "lm"), spread=0.3)


def engine(**options: Any) -> VLLMEngine:
    return VLLMEngine(max_prompt_tokens=40, max_new_tokens=8, cache_gb=0.5, options=options)


def drawn(asked: VLLMEngine, roles: Roles, version: int = 0, seed: int = 3) -> Responses:
    asked.take(roles, version)
    return asked.sample(roles, ROWS, SAMPLER, torch.Generator().manual_seed(seed), row_shard(len(ROWS.texts)))


def test_it_is_started_once_and_draws_from_the_weights_of_each_batch(roles: Roles) -> None:
    asked = engine(max_num_seqs=7)
    before = dict(os.environ)
    for version in range(2):
        ids, mask, logprobs, finished = drawn(asked, roles, version)
        rollout = as_rollout(roles, ROWS, (ids, mask, logprobs, finished), version)
        assert_rows_close(rows_of(logprobs, mask), plain_logprobs(plain_model(roles, "policy"), rollout, 0.8), 1e-5)
        with torch.no_grad():
            for parameter in roles.policy_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    (llm,) = FakeLLM.made
    assert llm.arguments["max_model_len"] == 48
    assert llm.arguments["kv_cache_memory_bytes"] == 500_000_000
    assert llm.arguments["dtype"] == "float32"
    assert llm.arguments["logprobs_mode"] == "processed_logprobs"
    assert llm.arguments["max_num_seqs"] == 7
    assert llm.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert dict(os.environ) == before
    asked.close()
    asked.close()
    assert llm.ended


def test_the_same_draws_give_the_same_responses(roles: Roles) -> None:
    asked = engine()
    first, again, other = (drawn(asked, roles, seed=seed)[0].tolist() for seed in (3, 3, 4))
    asked.close()
    assert first == again != other


def test_half_a_response_ends_the_run(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FakeLLM.answer

    def half(self: FakeLLM, prompt: dict[str, Any], given: Any) -> Any:
        answer = whole(self, prompt, given)
        answer.outputs[0].token_ids, answer.outputs[0].logprobs = [5], [{5: SimpleNamespace(logprob=-1.0)}]
        return answer

    monkeypatch.setattr(FakeLLM, "answer", half)
    asked = engine()
    with pytest.raises(EngineError, match=r"^vLLM answered with half a response: 1 of 5 tokens, and no end token"):
        drawn(asked, roles)
    asked.close()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("__init__", r"^vLLM did not start: ValueError: no room\. for it"),
        ("collective_rpc", r"^vLLM failed: ValueError: no room\. for it"),
        ("generate", r"^vLLM failed: ValueError: no room\. for it"),
    ],
)
def test_what_vllm_raises_is_one_sentence(
    method: str, said: str, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("no room.\n  for it")

    monkeypatch.setattr(FakeLLM, method, failing)
    asked = engine()
    with pytest.raises(EngineError, match=said):
        drawn(asked, roles)
    asked.close()


def test_several_processes_are_refused(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="engine=vllm serves one process; with several use engine=vllm_server"):
        engine().take(roles, 0)


def test_where_it_is_not_installed_the_recipe_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = PPOStage(compose(["engine=vllm", "reward=vader"]))
    monkeypatch.setattr(vllm_options, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"^vLLM is not installed here: `make vllm` .* \.venv-vllm/bin/python$"):
        stage.check_training()
    monkeypatch.setattr(vllm_options, "find_spec", lambda _: True)
    stage.check_training()
