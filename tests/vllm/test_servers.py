"""vLLM's own servers: the same weights, and no sample lost with a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from src.errors import EngineError
from src.rollout.engines.vllm_server import VLLMServers
from src.rollout.sampling import Sampler
from src.utils.distributed import row_shard
from tests.servers import free_port
from tests.tiny import FOREIGN_WARNINGS
from tests.vllm.shapes import Synchronizations, largest_difference, ppo, random_prompts, whole_models, write

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, *FOREIGN_WARNINGS, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
READY = 480.0  # seconds at most


class Started:
    """A server in a process group of its own."""

    def __init__(self, model: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "src.serve_rollout", model, "--port", str(port), "--max-tokens", "160"]
        self.process = subprocess.Popen([*command, "--cache-gb", "0.05"], cwd=ROOT, start_new_session=True)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            assert self.process.poll() is None
            return False

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


@contextmanager
def started(*models: str) -> Iterator[list[Started]]:
    with ExitStack() as ended:
        servers = []
        for model in models:
            servers.append(Started(model))
            ended.callback(servers[-1].kill)
        until = time.monotonic() + READY
        while not all(server.ready() for server in servers):
            assert time.monotonic() < until
            time.sleep(0.5)
        yield servers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {shape: write(tmp_path_factory.mktemp("lm"), shape) for shape in ("gpt2", "qwen2")}


@pytest.fixture(scope="module")
def servers(models: dict[str, str]) -> Iterator[list[Started]]:
    """Two of the GPT-2 shape, one of the Qwen2 shape."""
    with started(models["gpt2"], models["gpt2"], models["qwen2"]) as up:
        yield up


@pytest.mark.parametrize(("shape", "which"), [("gpt2", slice(2)), ("qwen2", slice(2, 3))])
@pytest.mark.parametrize("lora", ["model.lora.rank=4", "model.lora=null"])
def test_ppo_samples_from_the_weights_that_it_trains(
    lora: str, shape: str, which: slice, servers: list[Started], models: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Adapters are served merged; with whole models the tied head moves too."""
    seen = Synchronizations(monkeypatch)
    urls = ",".join(server.url for server in servers[which])
    ppo(shape, models[shape], tmp_path, lora, "engine=vllm_server", f"rollout.engine.urls=[{urls}]")
    assert len(seen.differences) == 3
    assert max(seen.differences) < 1e-4


def test_a_server_of_another_model_is_refused(servers: list[Started], models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="its model has model_type=gpt2, that of this run qwen2"):
        ppo("qwen2", models["qwen2"], tmp_path, "engine=vllm_server", f"rollout.engine.urls=[{servers[0].url}]")


def test_a_killed_server_costs_no_sample(
    servers: list[Started], models: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Killed while it answers: every prompt has its response, by the weights of the policy. Last, as it stays dead."""
    roles, prompts = whole_models(models["gpt2"]), random_prompts([3, 40, 9, 1] * 16)
    with torch.no_grad():
        for parameter in roles.policy_parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    engine = VLLMServers(
        40, 120, [server.url for server in servers[:2]], None, timeout=60, patience=60, attempts=3, concurrency=8
    )
    engine.take(roles, 0)
    killer = threading.Timer(1.0, servers[0].kill)
    killer.start()
    with caplog.at_level("WARNING"):
        draws = torch.Generator().manual_seed(1)
        responses = engine.sample(roles, prompts, Sampler(120, 0.7), draws, row_shard(len(prompts.texts)))
    killer.join()
    engine.close()
    assert len(responses[0]) == len(prompts.texts)
    assert largest_difference(roles, prompts, responses, 0.7) < 1e-4
    assert [message.partition(": ")[0] for message in caplog.messages] == [f"rollout server {servers[0].url}"]
