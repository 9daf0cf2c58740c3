"""The rollout engines."""

from __future__ import annotations

from typing import Any

from src.config.schema.nodes import Count, Node, Positive, Target, Typed


class Local(Node):
    """engine=local."""

    engine: Target


class VLLMTarget(Typed):
    """vLLM in a child process."""

    max_prompt_tokens: Count
    max_new_tokens: Count
    cache_gb: Positive
    options: dict[str, Any]


class VLLM(Node):
    """engine=vllm."""

    engine: VLLMTarget


class VLLMServersTarget(Typed):
    """vLLM on servers."""

    max_prompt_tokens: Count
    max_new_tokens: Count
    urls: list[str]
    folder: str | None
    timeout: Positive
    patience: Positive
    attempts: Count
    concurrency: Count


class VLLMServer(Node):
    """engine=vllm_server."""

    engine: VLLMServersTarget
