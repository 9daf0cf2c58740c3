"""Prompts as rows of token ids for an engine of others, and its answers as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from src.models.roles import Roles
from src.rollout.answering import Responses
from src.rollout.sampling import Sampler
from src.types import Prompts
from src.utils.distributed import RowShard

LARGEST_SEED = 2**62
ROUNDING = 1e-3  # nats: a log-probability may round to a little more than 0


@dataclass(frozen=True)
class Answer:
    """The token ids of a response, with its end token if it has one, and their log-probabilities in nats."""

    ids: list[int]
    logprobs: list[float]


def parameters(sampler: Sampler, seed: int, ends: list[int]) -> dict[str, Any]:
    """What the sampler draws, in the words of vLLM's `SamplingParams`.

    Each is given, as a server may have other defaults.
    """
    whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "n": 1}
    return whole | {
        "temperature": sampler.temperature, "max_tokens": sampler.max_new_tokens, "seed": seed,
        "stop_token_ids": ends, "ignore_eos": True, "logprobs": 0, "detokenize": False,
    }  # fmt: skip


def why_not(answer: Answer, sampler: Sampler, ends: Sequence[int]) -> str | None:
    """What is wrong with an answer, in words; None for a whole response that may have been drawn so."""
    ids, longest = answer.ids, sampler.max_new_tokens
    if not 1 <= len(ids) <= longest or len(answer.logprobs) != len(ids):
        return f"{len(ids)} tokens and {len(answer.logprobs)} log-probabilities, where 1 to {longest} were asked for"
    if not all(isinstance(token, int) for token in ids):
        return "token ids that are no numbers"
    if any(token in ends for token in ids[:-1]):
        return "tokens after the end token"
    if ids[-1] not in ends and len(ids) < longest:
        return f"half a response: {len(ids)} of {longest} tokens, and no end token"
    if not all(math.isfinite(number) and number <= ROUNDING for number in answer.logprobs):
        return "log-probabilities that cannot be any"
    return None


def token_rows(prompts: Prompts, share: RowShard) -> list[list[int]]:
    """The token ids of this rank's prompts, without padding."""
    own = zip(prompts.ids[share.index], prompts.mask[share.index], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in own]


def seeds(draws: torch.Generator, share: RowShard) -> list[int]:
    """A seed for each of this rank's rows; drawn for the whole batch, so that it does not depend on the ranks."""
    whole = torch.randint(LARGEST_SEED, (share.rows,), generator=draws, device=draws.device)
    return whole.cpu()[share.index.cpu()].tolist()


def end_ids(roles: Roles) -> list[int]:
    """The tokens that end a response."""
    return sorted(roles.endings.ids)


def as_tensors(answers: Sequence[Answer], roles: Roles, device: torch.device) -> Responses:
    """response_ids, response_mask and logprobs (N, T), finished (N,) of N answers, padded on the right."""
    pad_id = roles.tokenizer.pad_token_id
    ids = pad_sequence([torch.tensor(a.ids) for a in answers], batch_first=True, padding_value=pad_id).to(device)
    logprobs = pad_sequence([torch.tensor(a.logprobs) for a in answers], batch_first=True).to(device)
    lengths = torch.tensor([len(a.ids) for a in answers], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)
    stop_ids = torch.tensor(end_ids(roles), device=device)
    finished = torch.isin(ids.gather(1, lengths.unsqueeze(1) - 1).squeeze(1), stop_ids)
    return ids, mask, logprobs, finished
