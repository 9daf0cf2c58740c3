"""vLLM in a child process: what it serves are the weights that train, at every batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.errors import ConfigError, ModelError
from src.models.roles import Roles
from src.rollout.answering import Responses
from src.rollout.engines.vllm import VLLMEngine
from src.rollout.sampling import Sampler
from src.utils.distributed import row_shard
from tests.families import write_family
from tests.tiny import FOREIGN_WARNINGS
from tests.vllm.shapes import Synchronizations, largest_difference, ppo, random_prompts, whole_models, write

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, *FOREIGN_WARNINGS, pytest.mark.filterwarnings("ignore")]

SMALL = ("engine=vllm", "rollout.engine.cache_gb=0.05", "model.lora=null")
LONG = random_prompts([140, 1, 17, 64, 140, 3])  # some longer than a block of the prefix cache, and one of full length


@pytest.mark.parametrize("shape", ["gpt2", "qwen2"])
def test_ppo_samples_from_the_weights_that_it_trains(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight moves, the tied embedding too, and in float32 the engine follows within 1e-4."""
    seen = Synchronizations(monkeypatch)
    ppo(shape, write(tmp_path, shape), tmp_path, *SMALL)
    assert len(seen.differences) == 3
    assert max(seen.differences) < 1e-4
    assert all((after - before).abs().max() > 1e-3 for before, after in itertools.pairwise(seen.embeddings))


def test_a_stale_head_stops_the_run(tmp_path: Path) -> None:
    """Planted: the reload that vLLM does alone. The first batch is right, as the engine starts from its weights."""
    stale = "+rollout.engine.options.worker_extension_cls=tests.vllm.stale.StaleHead"
    with pytest.raises(ModelError, match=r"^iteration 2: .* differ by .* vLLM computes this model with other weights"):
        ppo("gpt2", write(tmp_path, "gpt2"), tmp_path, *SMALL, stale)


def test_heads_that_it_does_not_have_are_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the model has attention heads of 8 numbers; vLLM on a CPU has 32, 64, "):
        ppo("gpt2", write_family(tmp_path, "gpt2"), tmp_path, *SMALL)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return whole_models(write(tmp_path_factory.mktemp("lm"), "gpt2"))


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(max_prompt_tokens=140, max_new_tokens=20, cache_gb=0.05, options={})
    yield engine
    engine.close()


def drawn(engine: VLLMEngine, roles: Roles, seed: int, temperature: float = 0.7) -> Responses:
    engine.take(roles, 0)
    draws = torch.Generator().manual_seed(seed)
    return engine.sample(roles, LONG, Sampler(20, temperature), draws, row_shard(len(LONG.texts)))


def test_a_seed_gives_the_same_responses_and_nothing_else_here_changes(engine: VLLMEngine, roles: Roles) -> None:
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    first, again, other = (drawn(engine, roles, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    after = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_those_of_what_is_drawn(temperature: float, engine: VLLMEngine, roles: Roles) -> None:
    assert largest_difference(roles, LONG, drawn(engine, roles, 3, temperature), temperature) < 1e-4


def test_the_same_prompts_are_read_again_under_new_weights(engine: VLLMEngine, roles: Roles) -> None:
    """What the prefix cache holds of a prompt belongs to the weights that it was read with."""
    for _ in range(2):
        assert largest_difference(roles, LONG, drawn(engine, roles, 4), 0.7) < 1e-4
        with torch.no_grad():
            for parameter in roles.policy_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
