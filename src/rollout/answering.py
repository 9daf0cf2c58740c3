"""Responses as a rollout, whatever drew them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.models.roles import Role, Roles
from src.models.text import response_text
from src.rollout.minibatches import stacked
from src.rollout.sampling import Sampler
from src.types import Prompts, Rollout
from src.utils.distributed import RowShard, map_over_ranks

DRAWN = ("prompt_ids", "response_ids", "response_mask", "behavior_logprobs", "finished")

Responses = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, mask and logprobs (N, T), finished (N,)


def sampled(
    roles: Roles, role: Role, prompts: Prompts, sampler: Sampler, generator: torch.Generator | None, share: RowShard
) -> Responses:
    """The responses of `role` to this rank's prompts, drawn by this process (without a generator greedy)."""
    stop_ids = torch.tensor(sorted(roles.endings.ids), device=prompts.ids.device)
    mine = prompts.ids[share.index], prompts.mask[share.index]
    with roles.acting(role) as lm:
        return sampler.sample(lm, *mine, stop_ids, roles.tokenizer.pad_token_id, generator, share)


def answered(roles: Roles, prompts: Prompts, respond: Callable[[RowShard], Responses], policy_version: int) -> Rollout:
    """The rollout of all rows, of which `respond` draws those of a rank."""
    pad_id = roles.tokenizer.pad_token_id
    drawn = zip(*map_over_ranks(respond, len(prompts.texts)), strict=True)
    ids, mask, logprobs, finished = map(stacked, drawn, (pad_id, 0, 0, 0))
    return as_rollout(roles, prompts, (ids, mask, logprobs, finished), policy_version)


def as_rollout(roles: Roles, prompts: Prompts, responses: Responses, policy_version: int) -> Rollout:
    """The rollout of prompts and the responses to them, with the responses' texts."""
    ids, mask, logprobs, finished = responses
    texts = tuple(
        response_text(roles.tokenizer, prompt[prompt_mask], response[response_mask], roles.endings)
        for prompt, prompt_mask, response, response_mask in zip(prompts.ids, prompts.mask, ids, mask, strict=True)
    )
    return Rollout(
        prompt_ids=prompts.ids, prompt_mask=prompts.mask, response_ids=ids, response_mask=mask,
        behavior_logprobs=logprobs, finished=finished, prompt_index=prompts.index, group_ids=prompts.group_ids,
        prompts=prompts.texts, responses=texts, metadata=prompts.metadata, policy_version=policy_version,
    )  # fmt: skip


def prompts_of(rollout: Rollout) -> Prompts:
    """The prompts of a rollout."""
    return Prompts(
        ids=rollout.prompt_ids, mask=rollout.prompt_mask, index=rollout.prompt_index, group_ids=rollout.group_ids,
        texts=rollout.prompts, metadata=rollout.metadata,
    )  # fmt: skip


def drawn(rollout: Rollout) -> dict[str, Any]:
    """What of a rollout its prompts do not give again, and the prompts' ids: tensors and a number, for a checkpoint."""
    return {"policy_version": rollout.policy_version} | {name: getattr(rollout, name) for name in DRAWN}


def rollout_again(roles: Roles, prompts: Prompts, state: dict[str, Any]) -> Rollout | None:
    """The rollout of which `drawn` made `state`; None if that was made of other prompts."""
    ids, *responses = (state[name].to(prompts.ids.device) for name in DRAWN)
    if not torch.equal(ids, prompts.ids):
        return None
    return as_rollout(roles, prompts, (responses[0], responses[1], responses[2], responses[3]), state["policy_version"])
