"""vLLM in a child process of the run."""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
from transformers import PreTrainedModel

from src.errors import ConfigError, EngineError
from src.models.roles import Roles
from src.rollout.answering import Responses
from src.rollout.engines.policy_folder import PolicyFolder
from src.rollout.engines.rows import Answer, as_tensors, end_ids, parameters, seeds, token_rows, why_not
from src.rollout.engines.vllm_options import arguments, environment, refuse_heads, require_vllm, surrounded
from src.rollout.sampling import Sampler
from src.types import Prompts
from src.utils.distributed import RowShard, world_size
from src.utils.signals import held_back

log = logging.getLogger(__name__)


class VLLMEngine:
    """Starts vLLM at the first batch and gives it the policy's weights before each.

    `cache_gb`: memory of its cache of keys and values in GB (10^9 bytes); `options`: further arguments of `vllm.LLM`.
    On a GPU it sleeps while the policy trains: its cache is freed and its weights are moved to the CPU's memory.
    """

    fault = "vLLM computes this model with other weights or in another way"

    def __init__(self, max_prompt_tokens: int, max_new_tokens: int, cache_gb: float, options: dict[str, Any]) -> None:
        self.context, self.cache_gb, self.options = max_prompt_tokens + max_new_tokens, cache_gb, options
        self._folder = PolicyFolder(None)
        self._llm: Any = None

    def check(self) -> None:
        """Raise `ConfigError` where vLLM is not installed."""
        require_vllm()

    def take(self, roles: Roles, policy_version: int) -> None:
        """Write the policy into a folder, from which vLLM starts or reloads. Raises `EngineError`."""
        if world_size() > 1:
            raise ConfigError("engine=vllm serves one process; with several use engine=vllm_server (docs/engines.md)")
        folder = self._folder.write(roles, policy_version)
        if self._llm is None:
            with roles.acting("policy") as lm:
                self._llm = self._started(folder, lm)
        elif self._sleeps:
            self._ask("wake_up")
        self._ask("collective_rpc", "take_policy", args=(folder, self._folder.name))
        self._folder.keep_only_this()

    def sample(
        self, roles: Roles, prompts: Prompts, sampler: Sampler, draws: torch.Generator, share: RowShard
    ) -> Responses:
        """A response to each prompt, each from a random stream of its own. Raises `EngineError`."""
        from vllm import SamplingParams

        ends, rows = end_ids(roles), token_rows(prompts, share)
        asked = [{"prompt_token_ids": ids, "cache_salt": self._folder.name} for ids in rows]  # no cache of old weights
        drawn = [SamplingParams(**parameters(sampler, seed, ends)) for seed in seeds(draws, share)]
        outputs = self._ask("generate", asked, drawn, use_tqdm=False)
        answers = [_answer(output.outputs[0]) for output in outputs]
        for wrong in filter(None, (why_not(answer, sampler, ends) for answer in answers)):
            raise EngineError(f"vLLM answered with {wrong}")
        if self._sleeps:
            self._ask("sleep", level=1)
        return as_tensors(answers, roles, prompts.ids.device)

    def close(self) -> None:
        """End the child process and remove the folder."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._folder.close()

    @property
    def _sleeps(self) -> bool:
        return torch.cuda.is_available()

    def _started(self, folder: str, lm: PreTrainedModel) -> Any:
        """vLLM with the model of a folder; Ctrl-C reaches the run alone, which ends it."""
        log.info("vLLM starts, which takes about half a minute")
        with surrounded(environment()), held_back([signal.SIGINT]):
            from vllm import LLM

            refuse_heads(lm.config)
            dtype = str(lm.dtype).removeprefix("torch.")
            settings = arguments(dtype, self.context, self.cache_gb) | {"skip_tokenizer_init": True} | self.options
            try:
                return LLM(model=folder, **settings)
            except Exception as error:  # vLLM raises whatever its parts raise
                raise EngineError(f"vLLM did not start: {_line(error)}") from error

    def _ask(self, method: str, *given: Any, **named: Any) -> Any:
        try:
            return getattr(self._llm, method)(*given, **named)
        except Exception as error:
            raise EngineError(f"vLLM failed: {_line(error)}") from error


def _answer(output: Any) -> Answer:
    ids = list(output.token_ids)
    return Answer(ids, [given[token].logprob for token, given in zip(ids, output.logprobs, strict=True)])


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
