"""A call of every function of `src.core` and of the pure functions beside it, for the contracts that they all keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from src.core import (
    advantages,
    aggregation,
    correction,
    diagnostics,
    estimators,
    kl,
    logprobs,
    masking,
    moments,
    natural_gradient,
    overoptimization,
    padding,
    policy_losses,
    preference,
    rewards,
    value_losses,
)
from src.kernels import attention, linear
from src.models import vocab_head
from src.types import Episodes

VOCABULARY = 5
HEAD_WEIGHT = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, VOCABULARY)[[0, 1, 2, 1, 0]]


@dataclass
class Inputs:
    """Something of every kind that a core function takes; `x`, `y` and `z` are per token."""

    mask: Tensor  # (B, T) bool
    x: Tensor  # (B, T)
    y: Tensor  # (B, T)
    z: Tensor  # (B, T)
    scores: Tensor  # (B,)
    group_ids: Tensor  # (B,) int64
    finished: Tensor  # (B,) bool
    logits: Tensor  # (B, T, V)
    ids: Tensor  # (B, T) int64
    stop_ids: Tensor  # (K,) int64
    token_rows: list[list[int]]


Call = Callable[[Inputs], Any]


def make_inputs(mask: Tensor) -> Inputs:
    """Seeded inputs of the shape of a mask; two samples of each prompt."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    ids = torch.randint(0, VOCABULARY, mask.shape, generator=generator)
    return Inputs(
        mask=mask,
        x=normal(*mask.shape),
        y=normal(*mask.shape),
        z=normal(*mask.shape),
        scores=normal(len(mask)),
        group_ids=torch.arange(len(mask)) // 2,
        finished=torch.arange(len(mask)) % 2 == 0,
        logits=normal(*mask.shape, VOCABULARY),
        ids=ids,
        stop_ids=torch.tensor([1, 3]),
        token_rows=ids.tolist(),
    )


def episodes(i: Inputs) -> Episodes:
    """All that an estimator may ask for."""
    return Episodes(rewards=i.x, mask=i.mask, group_ids=i.group_ids, old_values=i.y, greedy_scores=i.scores)


def credit(estimator: estimators.Estimator) -> Call:
    """The advantages of an estimator."""
    return lambda i: estimator.advantages(episodes(i))


def after_a_batch(i: Inputs) -> Tensor:
    """The same batch twice, so that the baseline is made of it as well."""
    estimator = estimators.RunningMeanBaseline(0.9, 0.5)
    estimator.update(episodes(i))
    return estimator.advantages(episodes(i))


def policy_loss(loss: Callable[..., Any], *settings: float) -> Call:
    """A policy loss with its settings."""
    return lambda i: loss(i.x, i.y, i.z, i.mask, *settings)


def weighted(aggregate: Callable[..., Tensor], *settings: int) -> Call:
    """The total of x by an aggregation."""
    return lambda i: aggregation.weighted_sum(i.x, aggregate(i.mask, *settings), i.mask)


def never_asked() -> Tensor:
    raise AssertionError("the samples suffice")


def solution(i: Inputs) -> Tensor:
    """(V V^T + 1) x = scores, V the logits of each row."""
    v = i.logits.flatten(1).clamp(-3, 3)
    return natural_gradient.conjugate_gradient(lambda x: v @ (v.T @ x) + x, i.scores, 3)


def head(dtype: torch.dtype) -> torch.nn.Linear:
    """A vocabulary head with the weights that the others get."""
    layer = torch.nn.Linear(VOCABULARY, len(HEAD_WEIGHT), bias=False, dtype=dtype)
    layer.weight = torch.nn.Parameter(HEAD_WEIGHT.to(dtype))
    return layer


def fit(i: Inputs) -> tuple[float, float]:
    """A fit through points that are never too few."""
    distance = torch.cat([i.x.flatten().abs(), torch.tensor([0.5, 1.5], dtype=i.x.dtype)])
    return overoptimization.fit_gao_form(distance, distance.sin())


MASKED: dict[str, Call] = {
    "discounted_sum": lambda i: advantages.discounted_sum(i.x, i.mask, 0.9),
    "reward_to_go": lambda i: advantages.reward_to_go(i.x, i.mask, 0.9),
    "total_return": lambda i: advantages.total_return(i.x, i.mask, 0.9),
    "td_errors": lambda i: advantages.td_errors(i.x, i.y, i.mask, 0.9),
    "gae": lambda i: advantages.gae(i.x, i.y, i.mask, 0.9, 0.8),
    "lambda_returns": lambda i: advantages.lambda_returns(i.x, i.y, i.mask, 0.9, 0.8),
    "batch_mean_baseline": lambda i: advantages.batch_mean_baseline(i.x, i.mask, 0.9),
    "per_token": lambda i: advantages.per_token(i.scores, i.mask),
    "TotalReturn": credit(estimators.TotalReturn(0.9)),
    "RewardToGo": credit(estimators.RewardToGo(0.9)),
    "BatchMeanBaseline": credit(estimators.BatchMeanBaseline(0.9)),
    "NormalizedReturn": credit(estimators.NormalizedReturn(0.9)),
    "RunningMeanBaseline": after_a_batch,
    "ValueBaseline": credit(estimators.ValueBaseline(0.9, 0.7)),
    "TDError": credit(estimators.TDError(0.9, 0.7)),
    "GAE": credit(estimators.GAE(gamma=0.9, lam=0.8, critic_lam=0.7)),
    "GAE, returns": lambda i: estimators.GAE(gamma=0.9, lam=0.8, critic_lam=0.7).returns(episodes(i)),
    "LeaveOneOut": credit(estimators.LeaveOneOut()),
    "GroupRelative": credit(estimators.GroupRelative(group_scale=False)),
    "GroupRelative, scaled": credit(estimators.GroupRelative(group_scale=True)),
    "GreedyBaseline": credit(estimators.GreedyBaseline(0.9)),
    "weighted_sum": weighted(aggregation.token_mean),
    "weighted_sum, sequence_mean": weighted(aggregation.sequence_mean),
    "explained_variance": lambda i: diagnostics.explained_variance(i.x, i.y, i.mask),
    "masked": lambda i: masking.masked(i.x, i.mask),
    "masked_mean": lambda i: masking.masked_mean(i.x, i.mask),
    "masked_variance": lambda i: masking.masked_variance(i.x, i.mask),
    "whiten": lambda i: masking.whiten(i.x, i.mask),
    "whitening_scale": lambda i: masking.whitening_scale(i.x, i.mask),
    "whiten, mean kept": lambda i: masking.whiten(i.x, i.mask, shift_mean=False),
    "probability_ratio": lambda i: policy_losses.probability_ratio(i.x, i.y, i.mask),
    "sequence_ratio": lambda i: correction.sequence_ratio(i.x, i.y, i.mask),
    "effective_sample_size": lambda i: correction.effective_sample_size(i.x, i.mask),
    "Truncated": lambda i: correction.Truncated(2.0)(i.x, i.y, i.mask),
    "Masked": lambda i: correction.Masked(1e4, correction.sequence_ratio)(i.x, i.y, i.mask),
    "reinforce": policy_loss(policy_losses.reinforce),
    "surrogate": policy_loss(policy_losses.surrogate),
    "clipped_surrogate": policy_loss(policy_losses.clipped_surrogate, 0.2, 0.3),
    "dual_clipped_surrogate": policy_loss(policy_losses.dual_clipped_surrogate, 0.2, 0.3, 2.0),
    "sequence_clipped_surrogate": policy_loss(policy_losses.sequence_clipped_surrogate, 0.2, 0.3),
    "clipped_weight": policy_loss(policy_losses.clipped_weight, 0.2, 0.3),
    "Reinforce": policy_loss(policy_losses.Reinforce()),
    "Surrogate": policy_loss(policy_losses.Surrogate()),
    "ClippedSurrogate": policy_loss(policy_losses.ClippedSurrogate(0.2, 0.3)),
    "DualClippedSurrogate": policy_loss(policy_losses.DualClippedSurrogate(0.2, 0.3, 2.0)),
    "SequenceClippedSurrogate": policy_loss(policy_losses.SequenceClippedSurrogate(0.2, 0.3)),
    "ClippedWeight": policy_loss(policy_losses.ClippedWeight(0.2, 0.3)),
    "token_rewards": lambda i: rewards.token_rewards(i.scores, i.x, i.y, i.mask, 0.1),
    "squared_error": lambda i: value_losses.squared_error(i.x, i.y, i.mask),
    "clipped_squared_error": lambda i: value_losses.clipped_squared_error(i.x, i.y, i.z, i.mask, 0.2),
    "SquaredError": lambda i: value_losses.SquaredError()(i.x, i.y, i.z, i.mask),
    "ClippedSquaredError": lambda i: value_losses.ClippedSquaredError(0.2)(i.x, i.y, i.z, i.mask),
}
OTHERS: dict[str, Call] = {
    "groups": lambda i: advantages.groups(i.group_ids),
    "group_sum": lambda i: advantages.group_sum(i.scores, i.group_ids),
    "unequal": lambda i: advantages.unequal(i.scores, i.group_ids),
    "leave_one_out": lambda i: advantages.leave_one_out(i.scores, i.group_ids),
    "group_relative": lambda i: advantages.group_relative(i.scores, i.group_ids, scale=False),
    "group_relative, scaled": lambda i: advantages.group_relative(i.scores, i.group_ids, scale=True),
    "require_given": lambda i: estimators.require_given(i.scores),
    "token_mean": lambda i: aggregation.token_mean(i.mask),
    "sequence_mean": lambda i: aggregation.sequence_mean(i.mask),
    "constant_length": lambda i: aggregation.constant_length(i.mask, 7),
    "k1": lambda i: kl.k1(i.x, i.y),
    "k2": lambda i: kl.k2(i.x, i.y),
    "k3": lambda i: kl.k3(i.x, i.y),
    "categorical_kl": lambda i: kl.categorical_kl(i.logits.log_softmax(-1), (2 * i.logits).log_softmax(-1)),
    "SampledKL": lambda i: kl.SampledKL(kl.k2)(i.x, i.y, never_asked),
    "ExactKL": lambda i: kl.ExactKL()(i.x, i.y, lambda: i.z),
    "normalized_logits": lambda i: logprobs.normalized_logits(i.logits, 0.7),
    "linear": lambda i: linear.linear(i.logits, HEAD_WEIGHT.to(i.logits.dtype)),
    "prepacked": lambda i: linear.linear(
        i.logits.float(), HEAD_WEIGHT.float(), packed=linear.prepacked(HEAD_WEIGHT.float())
    ),
    "low_rank": lambda i: linear.low_rank(
        i.logits, i.logits, HEAD_WEIGHT.to(i.logits.dtype), HEAD_WEIGHT.to(i.logits.dtype).t(), 2.0
    ),
    "short_rows": lambda i: attention.short_rows(
        *i.logits.flatten(0, 1)[None, None].expand(3, 1, 1, -1, -1), [i.ids.numel()], 1.0
    ),
    "logprobs_from_logits": lambda i: logprobs.logprobs_from_logits(i.logits, i.ids, 0.7),
    "entropy_from_logits": lambda i: logprobs.entropy_from_logits(i.logits, 0.7),
    "head_logprobs": lambda i: vocab_head.head_logprobs(
        i.logits.flatten(0, 1), HEAD_WEIGHT.to(i.logits.dtype), None, i.ids.flatten(), 0.7, True
    ),
    "token_logprobs": lambda i: vocab_head.token_logprobs(
        head(i.logits.dtype), i.logits.flatten(0, 1), i.ids.flatten(), 0.7, entropy_trains=True
    ),
    "position_ids": lambda i: masking.position_ids(i.mask),
    "until_first_stop": lambda i: masking.until_first_stop(i.ids, i.stop_ids),
    "first_counted": lambda i: masking.first_counted(i.mask),
    "last_counted": lambda i: masking.last_counted(i.mask),
    "Moments": lambda i: torch.tensor(moments.of_batch(i.scores).std),
    "of_batch": lambda i: torch.tensor(astuple(moments.of_batch(i.scores))),
    "combined": lambda i: torch.tensor(astuple(moments.combined(moments.Moments(), moments.of_batch(i.scores)))),
    "conjugate_gradient": solution,
    "correlation": lambda i: diagnostics.correlation(i.x.flatten(), i.y.flatten()),
    "calibration": lambda i: diagnostics.calibration(i.x.flatten(), 4),
    "calibration_error": lambda i: diagnostics.calibration_error(i.x.flatten()),
    "centering": lambda i: preference.centering(i.scores, 2 * i.scores),
    "gao_form": lambda i: overoptimization.gao_form(i.x.flatten().abs(), 1.2, 0.5),
    "fit_gao_form": lambda i: torch.tensor(fit(i)),
    "turning_point": lambda i: torch.tensor(overoptimization.turning_point(*fit(i)) or 0.0),
    "step_length": lambda i: natural_gradient.step_length(i.scores.square().sum(), 0.1),
    "pad_left": lambda i: padding.pad_left(i.token_rows, 0),
    "few_sizes": lambda i: torch.tensor(linear.few_sizes(i.ids.numel())),
    "by_onednn": lambda i: torch.tensor(linear.by_onednn(i.logits.dtype)),
    "imitation": lambda i: preference.imitation(i.x.flatten()),
    "pairwise_loss": lambda i: preference.pairwise_loss(i.scores, -i.scores),
    "pairwise_accuracy": lambda i: preference.pairwise_accuracy(i.scores, -i.scores),
    "set_missing_eos": lambda i: rewards.set_missing_eos(i.scores, i.finished, -1.0),
    "subtract_missing_eos": lambda i: rewards.subtract_missing_eos(i.scores, i.finished, 1.0),
}
CONSTANT_OUTSIDE = {"probability_ratio": 1.0, "sequence_ratio": 1.0}  # all others are 0 there
# a number for the log, and credit, which is never learned through: where there is no variance they are set to 0 and
# their gradient means nothing
NEVER_DIFFERENTIATED_WITHOUT_VARIANCE = {"explained_variance", "GroupRelative, scaled"}
# exp(-d) of a token that has become e^10000 times less probable; the KL that is reported is not clamped (Checklist 46)
UNBOUNDED = {"k3"}


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a result, whatever it is packed in."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in (value.values() if isinstance(value, dict) else value) for x in tensors(part)]
