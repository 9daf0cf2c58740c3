"""One worked example: two short responses, and what each choice makes of them, by the functions of src.core."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from src.core.advantages import gae, group_relative
from src.core.aggregation import constant_length, sequence_mean, token_mean, weighted_sum
from src.core.kl import k1, k2, k3
from src.core.logprobs import logprobs_from_logits
from src.core.masking import masked, masked_mean, whiten
from src.core.policy_losses import clipped_surrogate, dual_clipped_surrogate
from src.core.rewards import set_missing_eos, subtract_missing_eos, token_rewards
from src.core.value_losses import clipped_squared_error, squared_error

MASK = torch.tensor([[True, True, True], [True, True, False]])
FINISHED = torch.tensor([True, False])
SCORES = torch.tensor([1.0, -0.5]).double()
LOGPROBS = torch.tensor([[-1.0, -0.5, -0.2], [-2.0, -0.7, 0.0]]).double()
REFERENCE = torch.tensor([[-1.2, -0.4, -0.5], [-2.1, -1.1, 0.0]]).double()
VALUES = torch.tensor([[0.1, 0.3, 0.6], [0.0, -0.2, 0.0]]).double()
LOGITS = torch.tensor([2.0, 1.0, 0.0]).double()
BETA, LAM = 0.1, 0.95


def numbers(x: Tensor) -> str:
    """Two decimals each."""
    return ", ".join(f"{value + 0.0:.2f}" for value in x.flatten().tolist())


def kl() -> Tensor:
    """k1 of each token."""
    return masked(k1(LOGPROBS, REFERENCE), MASK)


def rewards() -> Tensor:
    """Score at the last token, k1 in the reward."""
    return token_rewards(SCORES, torch.zeros_like(LOGPROBS), kl(), MASK, BETA)


def advantages() -> Tensor:
    """GAE, not whitened."""
    return gae(rewards(), VALUES, MASK, 1.0, LAM)


def place() -> str:
    """The score at the last token, or in a slot after it, which has a value."""
    at_end = gae(rewards()[1:], VALUES[1:], MASK[1:], 1.0, LAM)[0, :2]
    later = token_rewards(SCORES[1:], torch.zeros(1, 3).double(), kl()[1:], torch.ones(1, 3).bool(), BETA)
    after = gae(later, VALUES[1:], torch.ones(1, 3).bool(), 1.0, LAM)[0, :2]
    return f"advantages of response 2: {numbers(at_end)} at the last token; {numbers(after)} one slot later"


def cut_off() -> str:
    """The score of a response that was cut off."""
    found = [set_missing_eos(SCORES, FINISHED, -1.0), subtract_missing_eos(SCORES, FINISHED, 1.0), SCORES]
    return "score of response 2: {} set, {} with 1 subtracted, {} left".format(*(numbers(s[1]) for s in found))


def kl_place() -> str:
    """What the reward of a token holds."""
    without = token_rewards(SCORES, torch.zeros_like(LOGPROBS), kl(), MASK, 0.0)
    return f"rewards of response 1: {numbers(rewards()[0])} with the KL; {numbers(without[0])} with it in the loss"


def estimators() -> str:
    """The three estimates of a response's KL."""
    sums = [masked(k(LOGPROBS, REFERENCE), MASK)[0].sum() for k in (k1, k2, k3)]
    return "KL of response 1, nats: k1 {}, k2 {}, k3 {}".format(*map(numbers, sums))


def clamp() -> str:
    """k3 of a token that the reference likes e^4 times more."""
    d = k3(torch.tensor([-5.0]).double(), torch.tensor([-1.0]).double())
    return f"k3 of a token whose log-ratio is -4: {numbers(d)}; clamped {numbers(d.clamp(-10, 10))}"


def divisor() -> str:
    """Whitening by n - 1 or n."""
    n = int(MASK.sum())
    white = whiten(advantages(), MASK)
    return f"whitened, response 1: {numbers(white[0])} by n - 1; {numbers(white[0] * (n / (n - 1)) ** 0.5)} by n"


def mean_kept() -> str:
    """Whitening that adds the mean again."""
    kept = whiten(advantages(), MASK, shift_mean=False)
    means = [masked_mean(x, MASK) for x in (whiten(advantages(), MASK), kept)]
    return "mean of the whitened advantages: {} removed, {} added again".format(*map(numbers, means))


def padding() -> str:
    """Whitening that counts padding."""
    white = [whiten(advantages(), mask)[0] for mask in (MASK, torch.ones_like(MASK))]
    return "whitened, response 1: {} over tokens; {} with padding counted".format(*map(numbers, white))


def scope() -> str:
    """Whitening per minibatch."""
    whole = whiten(advantages(), MASK)
    alone = whiten(advantages()[:1], MASK[:1])
    return f"whitened, response 1: {numbers(whole[0])} over the batch; {numbers(alone[0])} if it is a minibatch alone"


def temperature() -> str:
    """Log-probabilities of the distribution that was sampled, or of another."""
    ids = torch.tensor(1)
    found = [logprobs_from_logits(LOGITS, ids, t) for t in (0.8, 1.0)]
    return "log p of the second of logits 2, 1, 0, sampled at 0.8: {} at 0.8; {} at 1".format(*map(numbers, found))


def filtered() -> str:
    """Log-probabilities with and without the filter of the sampler."""
    ids = torch.tensor(1)
    found = [logprobs_from_logits(LOGITS[:2], ids), logprobs_from_logits(LOGITS, ids)]
    return "log p of the second of logits 2, 1, 0, the third never sampled: {} filtered; {} not".format(
        *map(numbers, found)
    )


def policy_clip() -> str:
    """The clipped loss of a ratio of 1.25."""
    old = torch.zeros(1, 1).double()
    one = torch.ones(1, 1).double()
    found = [clipped_surrogate(old + math.log(1.25), old, one, one.bool(), c, c)[0] for c in (0.2, 0.1)]
    return "loss at ratio 1.25, A = 1: {} with 0.2; {} with 0.1".format(*map(numbers, found))


def dual_clip() -> str:
    """The loss of a bad action that has become five times as likely."""
    old, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    plain = clipped_surrogate(old + math.log(5), old, -one, one.bool(), 0.2, 0.2)[0]
    dual = dual_clipped_surrogate(old + math.log(5), old, -one, one.bool(), 0.2, 0.2, 3.0)[0]
    return f"loss at ratio 5, A = -1: {numbers(plain)} plain; {numbers(dual)} with the second bound 3"


def value_clip() -> str:
    """The value loss of the first token after a large step of the critic."""
    returns = advantages() + VALUES
    new = VALUES + 0.5
    plain, clipped = squared_error(new, returns, MASK), clipped_squared_error(new, VALUES, returns, MASK, 0.2)[0]
    pair = numbers(plain[0, 0]), numbers(clipped[0, 0])
    return "value loss of the first token, value 0.1 -> 0.6: {} plain; {} clipped at 0.2".format(*pair)


def half() -> str:
    """The factor of the value loss."""
    error = squared_error(VALUES, advantages() + VALUES, MASK)[0, 0]
    return f"value loss of the first token: {numbers(error)} with the factor; {numbers(2 * error)} without"


def aggregation() -> str:
    """The mean of -A over the batch, three ways."""
    ways = (token_mean(MASK), sequence_mean(MASK), constant_length(MASK, 3))
    found = [weighted_sum(-advantages(), w.double(), MASK) for w in ways]
    return "mean of -A: {} over tokens; {} over responses; {} by a constant length".format(*map(numbers, found))


def micro() -> str:
    """A mean of the means of micro-batches."""
    parts = [masked_mean(-advantages()[i : i + 1], MASK[i : i + 1]) for i in (0, 1)]
    whole = masked_mean(-advantages(), MASK)
    return (
        f"mean of -A: {numbers(whole)} over the tokens; {numbers((parts[0] + parts[1]) / 2)} of one-row micro-batches"
    )


def controller() -> str:
    """What steers an adaptive coefficient."""
    per_token = (kl().sum(1) / MASK.sum(1)).mean()
    return f"measured KL: {numbers(kl().sum(1).mean())} nats per response; {numbers(per_token)} per token"


def group_scale() -> str:
    """Two samples of one prompt, with and without the group's deviation."""
    ids = torch.zeros(2, dtype=torch.long)
    found = [group_relative(SCORES, ids, scale=scale) for scale in (True, False)]
    return "advantages of both responses as one group: {} divided; {} not".format(*map(numbers, found))


def score_clip() -> str:
    """Scores outside the range of the clip."""
    return f"a score of 12 counts {numbers(torch.tensor(12.0).clamp(-10, 10))} with a clip at 10"
