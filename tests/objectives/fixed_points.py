"""From samples: every setting that docs/objectives.md says reaches pi*, trained from another policy.

    make fixed-points

Three seeds, each with the iterations named and with four times as many, at a learning rate that falls to 0. Writes
benchmarks/results/fixed_points.md, and fails unless the KL(pi || pi*) that is left is below 0.01 and falls.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.optim import Adam

from benchmarks.provenance import provenance
from src.modules.lr_schedule import lr_schedule
from src.modules.ppo import PPOModule
from src.modules.weighted_means import WeightedMeans
from src.rollout.experience import ReferenceKL
from src.rollout.kl_controller import FixedKL
from src.rollout.minibatches import minibatches
from src.rollout.shaping import IgnoreMissingEos, NoScaling, ScoreShaping
from src.types import select
from tests.objectives.bandit import BETA, CONSTANT, Centered, Exact, Score, Table, logits, optimal_values, rollout
from tests.objectives.enumeration import Problem, all_responses, distance
from tests.objectives.page import ADVANTAGES, AGGREGATIONS, ESTIMATORS, LOSSES, PAIRS, SEED, accepted, chosen

ITERATIONS, SEEDS, LIMIT = 25, (1, 2, 3), 0.01
SAMPLES, GROUP, MINIBATCHES, RATE, START = 1024, 4, 2, 0.05, 4
RESULT = Path(__file__).parents[2] / "benchmarks/results/fixed_points.md"
SETTINGS: list[dict[str, Any]] = [
    *({"advantage": name} for name in ADVANTAGES),
    *({"policy_loss": name} for name in LOSSES if name != "clip"),
    {"aggregation": "constant_length"},
    {"whiten_advantages": True},
]


def train(place: str, kind: str, iterations: int, seed: int, advantage: str = "gae", policy_loss: str = "clip",
          aggregation: str = "token_mean", whiten_advantages: bool = False) -> float:  # fmt: skip
    """KL(pi || pi*) in nats after training from a random policy, by samples of it, the maker and the loss."""
    reference, draws = logits(SEED), torch.Generator().manual_seed(seed)
    roles = Table(logits(START), reference, optimal_values(reference))
    estimator, where = chosen(f"advantage={advantage}", "advantage"), ReferenceKL(
        place in ("reward", "both"), place in ("loss", "both"), ESTIMATORS[kind]
    )  # fmt: skip
    maker = Exact(
        reference_kl=where, kl_controller=FixedKL(BETA), whiten_advantages=whiten_advantages, batch_size=SAMPLES,
        advantage=Centered(estimator, CONSTANT) if estimator.needs_greedy else estimator,
        shaping=ScoreShaping(NoScaling(), None, IgnoreMissingEos()),
    )  # fmt: skip
    reward: Any = Score(reference)
    module = PPOModule(
        roles, reward, policy_loss=chosen(f"policy_loss={policy_loss}", "policy_loss"), value_loss=None,
        reference_kl=where.estimator, aggregation=AGGREGATIONS[aggregation],
        old_kl_controller=FixedKL(0.2) if policy_loss == "kl_penalty" else None,
    )  # fmt: skip
    optimizer = Adam(roles.policy_parameters(), lr=RATE)
    schedule = lr_schedule(optimizer, "linear", 0, iterations)
    problem, responses = Problem(reference, place, kind), all_responses()
    for iteration in range(iterations):
        probabilities = problem.at_visits(table_of(roles).log_softmax(-1)).sum(1).exp()
        rows = probabilities.multinomial(SAMPLES, replacement=True, generator=draws).tolist()
        maker.batch = rollout([responses[row] for row in rows], GROUP)
        prompts: Any = None
        experience, _ = maker.make(roles, reward, prompts, iteration, draws)
        module.objective.remember_old_policy()
        for index in minibatches(SAMPLES, SAMPLES // MINIBATCHES, draws):
            minibatch = select(experience, index)
            optimizer.zero_grad()
            module.objective.loss(minibatch, module.aggregation(minibatch.mask).double(), WeightedMeans()).backward()
            optimizer.step()
        schedule.step()
    return distance(problem, table_of(roles))


def table_of(roles: Table) -> torch.Tensor:
    """The policy's logits, (states, words)."""
    return roles.policy_parameters()[0].detach().t()


def main() -> None:
    """Train every setting, write the table, and fail if one is not there."""
    cases = [(pair, settings) for settings in SETTINGS for pair in PAIRS if accepted(pair[0], settings)]
    lines, bad = [], []
    for (place, kind), settings in track(cases, description="fixed points"):
        short, long = (
            [train(place, kind, n, seed, **settings) for seed in SEEDS] for n in (ITERATIONS, 4 * ITERATIONS)
        )
        name = " ".join([f"kl={place} kl_estimator={kind}", *(f"{k}={v}" for k, v in settings.items())])
        cells = [", ".join(f"{left:.5f}" for left in found) for found in (short, long)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
        if max(long) >= LIMIT or sum(long) >= sum(short):
            bad.append(name)
    title = f"KL(pi, pi*) in nats, seeds {', '.join(map(str, SEEDS))}"
    head = [f"| {title} | {ITERATIONS} iterations | {4 * ITERATIONS} iterations |", "|---|---|---|"]
    RESULT.write_text("\n".join([provenance(), "", *head, *lines]) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))
    if bad:
        sys.exit("pi* is not reached: " + "; ".join(bad))


if __name__ == "__main__":
    main()
