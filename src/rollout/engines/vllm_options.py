"""How vLLM is started, in a child process and as a server alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig

from src.errors import ConfigError

WORKER = "src.rollout.engines.vllm_worker.PolicyWorker"
GB = 10**9
MISSING = (
    "vLLM is not installed here: `make vllm` makes an environment with it and this repository "
    "(docs/engines.md); then start the command by .venv-vllm/bin/python"
)


def environment() -> dict[str, str]:
    """Environment variables of the process in which vLLM computes; those that the user has set stay."""
    chosen = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # a child has its own random state, threads and process group
    }
    if not torch.cuda.is_available():
        # its compiled helpers take 40 s at the first token; binding threads to cores would fight with the training
        chosen |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def arguments(dtype: str, context: int | None, cache_gb: float) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; as flags those of its server."""
    gpu = torch.cuda.is_available()
    return {
        "dtype": dtype,
        "max_model_len": context,
        "kv_cache_memory_bytes": int(cache_gb * GB),
        "logprobs_mode": "processed_logprobs",  # at the temperature of sampling; the default is at temperature 1
        "generation_config": "vllm",  # no top-k, top-p or temperature of the model's own
        "worker_extension_cls": WORKER,
        "enforce_eager": not gpu,
        "enable_sleep_mode": gpu,
        "seed": 0,
        "disable_log_stats": True,
    }


def require_vllm() -> None:
    """Raise `ConfigError` with the command that installs it where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ConfigError(MISSING)


def refuse_heads(config: PretrainedConfig) -> None:
    """Raise `ConfigError` for attention heads of a size that vLLM does not have on a CPU."""
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text, sizes = config.get_text_config(), CPUAttentionBackend.get_supported_head_sizes()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in sizes:
        raise ConfigError(
            f"the model has attention heads of {size} numbers; vLLM on a CPU has {', '.join(map(str, sizes))}: use "
            f"engine=local"
        )


@contextmanager
def surrounded(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables that hold within the block, for the processes that are started there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
