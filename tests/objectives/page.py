"""docs/objectives.md: what each place and estimator of the KL optimizes, by enumeration and by the pipeline."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from src.config.compose import compose
from src.config.schema.names import KL_UNEVEN
from src.core.aggregation import constant_length, sequence_mean, token_mean
from src.core.kl import ExactKL, KLEstimator, SampledKL, k1, k2, k3
from src.stages.objects import instantiate
from tests.objectives.bandit import BETA, LONGEST, ROWS, Table, gradient, logits, optimal_values
from tests.objectives.enumeration import Problem, distance

SEED = 3  # of the reference
ESTIMATORS: dict[str, KLEstimator] = {"k1": SampledKL(k1), "k2": SampledKL(k2), "k3": SampledKL(k3), "exact": ExactKL()}
MEANING = {
    ("reward", "k1"): "E[r] - beta KL(pi, ref), the KL of whole responses",
    ("both", "exact"): "the same",
    ("both", "k3"): "the same",
    ("loss", "k2"): "the KL of each state for itself: no token answers for the KL that follows from it",
    ("loss", "exact"): "the same, without sampling noise",
    ("loss", "k3"): "KL(ref, pi) of each state for itself (GRPO)",
    ("reward", "k2"): "refused: little of the KL's gradient is left",
    ("reward", "k3"): "refused: little of the KL's gradient is left",
    ("reward", "exact"): "refused: none of the gradient of a state's own KL is left",
}
AGGREGATIONS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": partial(constant_length, length=LONGEST),
}
PAIRS = (("reward", "k1"), ("both", "exact"), ("both", "k3"))
ADVANTAGES = (
    "gae", "td", "reward_to_go", "total_return", "baseline_batch", "baseline_value", "remax", "rloo",
    "group_relative ppo.group_scale=false",
)  # fmt: skip
LOSSES = ("clip", "dual_clip", "gspo", "cispo", "kl_penalty", "reinforce")
TEXT = f"""# What each KL setting optimizes

Written by `python -m tests.objectives`; a test compares this page with what the code does.

For max E[r] - beta KL(pi, ref) the optimum is known: pi*(y) = ref(y) exp(r(y) / beta) / Z. Here: responses of one to
{LONGEST} words out of three, one of which ends a response; beta = {BETA}; pi* has rational shares, so that a batch of
{ROWS} holds each response exactly as often as pi* draws it. KL(p, q) stands for KL(p || q), summed over a response,
in nats.

**The gradient of the expected KL has two parts**: with KL_t the KL of the state s_t,

    grad E[sum_t KL_t] = E[ sum_t grad KL_t  +  sum_t grad log pi(a_t) sum_(l >= t) KL_l ]

The first part is a term of the loss, the second a reward of -KL_t per token. The same holds for an unbiased estimate
of KL_t. For k1 the first part is 0 in expectation, so k1 may stand in the reward alone. For any other estimate either
part alone optimizes something else. What is whitened must scale both parts alike: the KL's coefficient in the loss is
divided by the deviations that rewards or advantages are divided by.

## Where the KL is, and how it is estimated

KL(pi, pi*) is measured where the expected gradient vanishes, by enumeration, with reward to go and without whitening;
"runs away": there is no such point near pi*. The last column is the largest entry of the loss's gradient at pi*.

| kl | kl_estimator | it optimizes | KL(pi, pi*) there | gradient at pi* |
|---|---|---|---|---|
"""
SETTINGS_TEXT = """
## With which settings pi* is reached

The largest entry of the gradient at pi*, through the experience maker and the loss, with one minibatch and
`advantage=gae` where no other is named; 0 is below 1e-6, and what is left there comes from scores in float32.
Whitening divides by the deviation of the advantages: with `kl=reward` it is about 0 at pi*, where all advantages
vanish, so rounding is enlarged there. `rloo` is scaled by (N - 1) / N, as a batch of exact shares is no sample; for
the same reason the row of `group_relative` does not show what a mean over samples does (below).

"""
LIMITS = """
Not reached, by any of them: with `ppo.whiten_rewards=true`, which keeps the mean of the rewards and so adds a
constant to the reward of each token; with gamma below 1; and with `aggregation=sequence_mean` unless a critic centers
the advantages, as it weighs the tokens of short responses more. `kl=both` is refused with a `correction`,
`aggregation=sequence_mean`, `advantage=reinforce_pp` and `advantage=group_relative`, which weigh its two parts
differently: the mean of a group of N holds the response itself, which shortens the part in the reward to (N - 1) / N.
Trained from samples with N = 4 that ends at a KL(pi, pi*) of 0.03; `advantage=rloo` leaves the response out. With
several minibatches the KL in the loss is that of states which the old policy has visited, and `policy_loss=clip`
clips the policy's term alone. `make fixed-points` trains from samples, in two minibatches,
with every setting of the table that reaches pi*, and measures the KL(pi, pi*) that is left.

**Which to choose.** `kl=reward` with k1 is the default: at pi* reward and KL cancel in each sample, so its noise
vanishes there, and it needs no pass over the vocabulary.
"""


def measured(
    place: str, kind: str, *, advantage: str = "gae", policy_loss: str = "clip", aggregation: str = "token_mean",
    whiten_rewards: bool = False, whiten_advantages: bool = False, policy: int = 0, critic: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the policy's loss, by the code that trains; at pi* unless another table is named."""
    reference = logits(SEED)
    where: Any = SimpleNamespace(
        in_reward=place in ("reward", "both"), in_loss=place in ("loss", "both"), estimator=ESTIMATORS[kind]
    )
    estimator = chosen(f"advantage={advantage}", "advantage")
    roles = Table(logits(policy), reference, optimal_values(reference) if critic is None else critic)
    found, _ = gradient(
        where, roles, whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages, advantage=estimator,
        policy_loss=chosen(f"policy_loss={policy_loss}", "policy_loss"), aggregation=AGGREGATIONS[aggregation],
    )  # fmt: skip
    return found.t()


def accepted(place: str, settings: dict[str, Any]) -> bool:
    """Whether the configuration accepts them together."""
    return place != "both" or not any(f"{k}={str(v).split()[0]}" in KL_UNEVEN for k, v in settings.items())


@cache
def chosen(overrides: str, key: str) -> Any:
    """The object that an option of the command line makes."""
    given = [*overrides.split(), "rollout.samples_per_prompt=2"]
    ppo: Any = compose(given).ppo
    if getattr(ppo, "gamma", 1.0) != 1.0:
        ppo = compose([*given, "ppo.gamma=1.0"]).ppo
    return instantiate(getattr(ppo, key), f"ppo.{key}")


def largest(found: Tensor) -> str:
    """Its largest entry, to one digit."""
    size = float(found.abs().max())
    return "0" if size < 1e-6 else "< 1e-4" if size < 1e-4 else f"{size:.0e}"


def page() -> str:
    """The whole page."""
    lines = []
    for (place, kind), meaning in MEANING.items():
        problem = Problem(logits(SEED), place, kind)
        point = problem.fixed_point()
        away = "runs away" if point is None else f"{distance(problem, point):.4f}"
        lines.append(
            f"| {place} | {kind} | {meaning} | {away} | {largest(measured(place, kind, advantage='reward_to_go'))} |"
        )
    names = [f"kl={place} kl_estimator={kind}" for place, kind in PAIRS]
    lines += ["", SETTINGS_TEXT.strip("\n"), "", f"| setting | {' | '.join(names)} |", "|---" * (len(PAIRS) + 1) + "|"]
    rows: list[tuple[str, dict[str, Any]]] = [(f"advantage={name}", {"advantage": name}) for name in ADVANTAGES]
    rows += [(f"policy_loss={name}", {"policy_loss": name}) for name in LOSSES]
    rows += [(f"aggregation={name}", {"aggregation": name}) for name in AGGREGATIONS]
    crude = {"aggregation": "sequence_mean", "advantage": "reward_to_go"}
    rows += [("aggregation=sequence_mean advantage=reward_to_go", crude)]
    rows += [("ppo.whiten_advantages=true", {"whiten_advantages": True})]
    rows += [("ppo.whiten_rewards=true", {"whiten_rewards": True})]
    for title, options in rows:
        cells = [
            largest(measured(*pair, **options)) + ("" if accepted(pair[0], options) else ", refused") for pair in PAIRS
        ]
        lines.append(f"| `{title}` | {' | '.join(cells)} |")
    return TEXT.rstrip("\n") + "\n" + lines[0] + "\n" + "\n".join(lines[1:]) + "\n" + LIMITS
