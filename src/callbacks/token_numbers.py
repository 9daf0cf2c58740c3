"""What PPO knows of each token of some responses: log-probabilities, KL, reward, value, advantage, ratio, clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.core.kl import k1
from src.core.policy_losses import probability_ratio
from src.modules.ppo import PPOModule
from src.rollout.minibatches import join, micro_batches
from src.types import Experience
from src.utils.nonfinite import json_number

LONGEST = 512  # tokens of a response whose numbers are kept
CONTEXT = 8  # tokens before one that decide how it is written


@torch.no_grad()
def token_numbers(module: PPOModule, experience: Experience) -> list[dict[str, list[Any]]]:
    """The pieces of each response with their numbers, of the first `LONGEST` tokens.

    `logprob` and `ref_logprob` in nats, of the policy that sampled and of the reference; `kl`, their difference (k1);
    `reward`, `value` and `advantage` as learned from; `ratio` of the policy after the update to the one that sampled;
    `clipped`: 1 where the loss would now be clipped. What a run lacks (a reference, a critic, a clip) is absent.
    """
    mask, old = experience.mask, experience.old_logprobs
    new = _logprobs_now(module, experience)
    _, indicators = module.objective.policy_loss(new, old, experience.advantages, mask)
    known: dict[str, Tensor | None] = {
        "logprob": old,
        "ref_logprob": experience.ref_logprobs,
        "kl": None if experience.ref_logprobs is None else k1(old, experience.ref_logprobs),
        "reward": experience.rewards,
        "value": experience.old_values,
        "advantage": experience.advantages,
        "ratio": probability_ratio(new, old, mask),
        "clipped": indicators.get("clip_fraction"),
    }
    given = {name: x for name, x in known.items() if x is not None}
    rows = []
    for row, own in enumerate(mask):
        ids = experience.rollout.response_ids[row][own][:LONGEST].tolist()
        prompt = experience.rollout.prompt_ids[row][experience.rollout.prompt_mask[row]][-CONTEXT:].tolist()
        numbers = {name: _plain(x[row][own][:LONGEST]) for name, x in given.items()}
        rows.append({"text": pieces(module.roles.tokenizer, prompt, ids), **numbers})
    return rows


def pieces(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    """What each token adds to the text, special tokens by their names; joined they are the text.

    A character of several tokens belongs to its last one; the others show the replacement character.
    """
    found, whole = [], [*before, *ids]
    for place in range(len(before), len(whole)):
        context = whole[max(0, place - CONTEXT) : place]
        start, text = _decode(tokenizer, context).rstrip("\ufffd"), _decode(tokenizer, [*context, whole[place]])
        alone = _decode(tokenizer, [whole[place]])
        found.append(text[len(start) :].lstrip("\ufffd") or alone if text.startswith(start) else alone)
    return found


def _logprobs_now(module: PPOModule, experience: Experience) -> Tensor:
    """log pi of the present policy, (B, T), a few rows at a time."""
    micros = micro_batches(experience.rollout, module.settings.micro_batch_size)
    temperature = module.settings.temperature
    return join(
        [(index, module.roles.distribution(micro, temperature).logprobs()) for index, micro in micros],
        experience.mask.shape,
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _plain(x: Tensor) -> list[float | str]:
    return [json_number(float(f"{value:.5g}")) for value in x.float().tolist()]
