"""What a rollout engine does: take the policy's weights, draw responses from them, and say how probable each was."""

from __future__ import annotations

from typing import Protocol

import torch

from src.models.roles import Roles
from src.rollout.answering import Responses
from src.rollout.sampling import Sampler
from src.types import Prompts
from src.utils.distributed import RowShard


class RolloutEngine(Protocol):
    """Draws the responses that a policy learns from, and nothing else.

    Greedy responses, the reference and all evaluation stay with the sampler of this process, so that no measured figure
    depends on the engine. An engine draws a_t ~ softmax(logits / temperature) from the whole vocabulary until an end
    token of `roles.endings` or the length limit. Its constructor keeps settings only and imports no library that may be
    missing: chats and evaluations of a trained policy make it too.
    """

    fault: str  # what is wrong when its log-probabilities are not those of the policy, as the end of a sentence

    def check(self) -> None:
        """Raise `ConfigError` if it cannot work on this machine; called before weights are loaded for training."""
        ...

    def take(self, roles: Roles, policy_version: int) -> None:
        """Serve the weights of the policy as they are now, after `policy_version` iterations.

        Called before each batch that is drawn, on every rank; the first call may start whatever the engine needs.
        """
        ...

    def sample(
        self, roles: Roles, prompts: Prompts, sampler: Sampler, draws: torch.Generator, share: RowShard
    ) -> Responses:
        """A response of the policy that was taken to each of this rank's prompts, those at `share.index`.

        Temperature and length limit are those of `sampler`, the sampler of this process.
        Called only on ranks that have rows, once for each `take`. All random numbers derive from `draws`, which is in
        the same state on every rank, so a row's response depends neither on the number of ranks nor on the other rows.
        Returns response_ids (N, T), padded on the right with the tokenizer's padding token; response_mask (N, T), True
        up to and including the first end token; logprobs (N, T) in nats at the temperature of sampling, 0 outside the
        mask; finished (N,), whether the response has its end token.
        """
        ...

    def close(self) -> None:
        """Let go of processes, memory and connections; called when training ends in whatever way, maybe twice."""
        ...
