"""A worker with the trap of vLLM's reload: a tied output head that stays as it was."""

from __future__ import annotations

from typing import Any

from src.rollout.engines.vllm_worker import PolicyWorker


class StaleHead(PolicyWorker):
    def take_policy(self, folder: str, name: str) -> None:
        self.model_runner: Any
        self.model_runner.reload_weights(weights_path=folder)
