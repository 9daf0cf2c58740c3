"""What can be wrong with a learned reward, and with the preference pairs that it learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from src.core.preference import pairwise_accuracy
from src.models.loading import readable_length
from src.models.scalar_head import output_layer
from src.models.text import encode_completions, shorten
from src.rewards.adapter import AdapterReward
from src.rewards.answers import as_numbers
from src.rewards.learned import LearnedReward, score_rows
from src.rewards.mix import MixReward
from src.rewards.steps import StepReward
from src.types import PreferencePair
from src.utils.check import Check, checked
from src.utils.statistics import share

ScoreTexts = Callable[[list[str], list[str]], Tensor]  # prompts, responses -> (N,)


def learned_parts(reward: Any) -> list[LearnedReward | AdapterReward]:
    """The learned rewards in a reward."""
    inside = reward.step if isinstance(reward, StepReward) else reward
    parts = inside.parts.values() if isinstance(inside, MixReward) else [inside]
    return [part for part in parts if isinstance(part, LearnedReward | AdapterReward)]


def learned(reward: LearnedReward | AdapterReward, pairs: Sequence[PreferencePair]) -> Check:
    """Whether a reward model prefers what was chosen in held-out pairs (none: its head alone is looked at).

    Faults: it prefers what was rejected (its 95% interval lies below one half); it is no better than chance and its
    head has the spread that new heads are made with; all scores are equal. No better than chance alone is a warning.
    """
    name, head = "reward model", _head(reward)
    width, spread = head.numel(), head.double().std().item()
    new = any(abs(spread / made - 1) < 4 / (2 * width) ** 0.5 for made in _spreads_of_new_heads(reward, width))
    mend = "train it (stage=reward), or give the reward.path of a model that is trained"
    about = (
        f"its head has the spread {spread:.3g}, as a new one has" if new else f"its head has the spread {spread:.3g}"
    )
    if not pairs:
        return checked(name, f"{about}; the data has no pairs to try it on", mend, fault=not spread > 0, warning=new)
    chosen, rejected = _scores(_text_scorer(reward), pairs)
    right = share(pairwise_accuracy(chosen, rejected).tolist())
    low, high = right.interval or (0.0, 1.0)
    scores = torch.cat([chosen, rejected]).double()
    found = f"prefers the chosen one in {right:.2f} of {right.n} held-out pairs; scores {scores.mean():.3g} +- "
    found += f"{scores.std():.3g}; {about}"
    if high < 0.5:
        found, mend = f"{found}: it prefers what was rejected", "swap data.columns.chosen and rejected, train it again"
    flat = not scores.std() > 0
    return checked(name, found, mend, fault=flat or high < 0.5 or (new and low <= 0.5), warning=low <= 0.5)


def pairs_by(reward: Any, pairs: Sequence[PreferencePair]) -> Check:
    """Whether a reward that scores text, such as a gold reward, prefers what was chosen; a fault if the opposite."""

    def score(prompts: list[str], responses: list[str]) -> Tensor:
        given = reward.score(prompts, responses, [{"finished": True} for _ in prompts])
        return as_numbers(reward, given, torch.Size([len(prompts)]))[0].cpu()

    right = share(pairwise_accuracy(*_scores(score, pairs)).tolist())
    low, high = right.interval or (0.0, 1.0)
    return checked(
        "preference pairs",
        f"the gold reward prefers the chosen one in {right:.2f} of {right.n} pairs",
        "are data.columns.chosen and data.columns.rejected swapped? The reward model learns from these pairs",
        fault=high < 0.5,
        warning=low <= 0.5,
    )


def _scores(score: ScoreTexts, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    prompts = [pair.prompt for pair in pairs]
    both = score(prompts * 2, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    chosen, rejected = both.chunk(2)
    return chosen, rejected


def _text_scorer(reward: LearnedReward | AdapterReward) -> ScoreTexts:
    if isinstance(reward, LearnedReward):
        return lambda prompts, responses: reward.score(prompts, responses, [])
    return partial(_adapter_scores, reward)


def _adapter_scores(reward: AdapterReward, prompts: list[str], responses: list[str]) -> Tensor:
    roles = reward.roles
    assert roles is not None  # it is loaded with the module
    with roles.acting("reward") as lm:
        limit, device = readable_length(lm.config, roles.tokenizer), lm.device
    rows = encode_completions(roles.tokenizer, prompts, responses, False)
    short = [shorten(row, limit, roles.tokenizer) for row in rows]
    return score_rows(roles.scores, short, roles.tokenizer.pad_token_id, reward.batch_size, device)


def _head(reward: LearnedReward | AdapterReward) -> Tensor:
    if isinstance(reward, LearnedReward):
        return output_layer(reward.model).weight.detach()
    head = None if reward.roles is None else reward.roles.score_head
    assert isinstance(head, nn.Linear)  # it is loaded with the module
    return head.weight.detach()


def _spreads_of_new_heads(reward: LearnedReward | AdapterReward, width: int) -> list[float]:
    """The standard deviations of heads as transformers and this project make them (`models.reward_choices.scoring`)."""
    own = 1 / (width + 1) ** 0.5
    if isinstance(reward, AdapterReward):
        return [own]
    return [own, float(getattr(reward.model.config.get_text_config(), "initializer_range", own) or own)]
