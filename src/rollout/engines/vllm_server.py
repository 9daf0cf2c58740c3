"""vLLM on servers of its own, over HTTP."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from src.errors import NO_SECRETS, ConfigError, require, without_secrets
from src.models.roles import Roles
from src.rewards.request import BadAnswerError, Body, in_own_loop, is_address
from src.rollout.answering import Responses
from src.rollout.engines.dispatch import Dispatch, Weights
from src.rollout.engines.policy_folder import PolicyFolder
from src.rollout.engines.rows import Answer, as_tensors, end_ids, parameters, seeds, token_rows, why_not
from src.rollout.engines.vllm_worker import description
from src.rollout.sampling import Sampler
from src.types import Prompts
from src.utils.distributed import RowShard, gather, rank


class VLLMServers:
    """Gives the policy's weights to servers by a folder that they can read, and sends them token ids.

    `urls`: their addresses, without a path; `folder`: where weights are written, under a path that is the same for
    all servers (None: a temporary folder of this machine). `Dispatch` describes the other settings.
    """

    fault = "the rollout servers compute this model with other weights or in another way"

    def __init__(
        self, max_prompt_tokens: int, max_new_tokens: int, urls: list[str], folder: str | None, timeout: float,
        patience: float, attempts: int, concurrency: int,
    ) -> None:  # fmt: skip
        require(len(urls) >= 1 and len(set(urls)) == len(urls), "urls", urls, "one address or several different ones")
        for url in urls:
            if without_secrets(url) != url:
                raise ConfigError(f"rollout server {without_secrets(url)}: {NO_SECRETS}")
            require(is_address(url), "urls", url, "addresses that start with http:// or https://")
        self.context, self._folder = max_prompt_tokens + max_new_tokens, PolicyFolder(folder)
        self._dispatch = partial(
            Dispatch, [url.rstrip("/") for url in urls], timeout=timeout, patience=patience, attempts=attempts,
            concurrency=concurrency,
        )  # fmt: skip
        self._weights: Weights | None = None

    def check(self) -> None:
        """The servers are asked when their first weights are there, with which they are compared."""

    def take(self, roles: Roles, policy_version: int) -> None:
        """Rank 0 writes the policy and lets the servers load it. Raises `EngineError` when none can."""
        weights = None
        if rank() == 0:
            with roles.acting("policy") as lm:
                own = description(lm.config, str(lm.dtype), roles.tokenizer)
            folder = self._folder.write(roles, policy_version)
            weights = Weights(folder, self._folder.name, own, self.context)
            dispatch = self._dispatch(weights)
            in_own_loop(dispatch.load)
            self._folder.keep_only_this()
        self._weights = gather(weights)[0]  # the other ranks wait here until it is loaded

    def sample(
        self, roles: Roles, prompts: Prompts, sampler: Sampler, draws: torch.Generator, share: RowShard
    ) -> Responses:
        """A response to each prompt, each from a random stream of its own. Raises `EngineError`."""
        assert self._weights is not None  # `take` comes first
        ends = end_ids(roles)
        bodies = [
            {
                "token_ids": ids, "return_token_ids": True, "cache_salt": self._weights.name,
                "sampling_params": parameters(sampler, seed, ends),
            }
            for ids, seed in zip(token_rows(prompts, share), seeds(draws, share), strict=True)
        ]  # fmt: skip
        read = partial(_answer, sampler, ends)
        dispatch = self._dispatch(self._weights)
        answers = in_own_loop(lambda: dispatch.answers(bodies, read))
        return as_tensors(answers, roles, prompts.ids.device)

    def close(self) -> None:
        """Remove the folder; the servers keep the last weights."""
        self._folder.close()


def _answer(sampler: Sampler, ends: list[int], answer: Any, body: Body) -> Answer:
    """The response in an answer of vLLM. Raises `BadAnswerError` unless it is a whole one to the prompt of the body."""
    try:
        (choice,) = answer["choices"]
        tokens = choice["logprobs"]["content"]
        found = Answer(list(choice["token_ids"]), [float(token["logprob"]) for token in tokens])
        same = answer["prompt_token_ids"] == body["token_ids"] and [t["token_id"] for t in tokens] == found.ids
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(f"no token ids and log-probabilities but {str(answer)[:80]!r}") from error
    if not same:
        raise BadAnswerError("an answer to other token ids than were asked, or log-probabilities of other tokens")
    if wrong := why_not(found, sampler, ends):
        raise BadAnswerError(wrong)
    return found
