"""Policy and reference on the same held-out prompts, with the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan

from torch import Tensor

from src.core.kl import k1
from src.core.masking import masked
from src.errors import RewardError
from src.models.roles import Role, Roles
from src.rollout.experience import ExperienceMaker
from src.types import AnyReward, Corpus, Prompts, Rollout
from src.utils.seeding import generator
from src.utils.statistics import Figure, bootstrap_mean, share
from src.utils.text_metrics import distinct_ngrams

SCORED = ("score", "greedy_score", "gold")  # measures that a reward gives: NaN for an answer that it could not score
AMOUNTS = (
    "kl",
    "reference_nats",
    "response_length",
    "repetition",
)  # measures that are no shares, even if every row is 0 or 1


@dataclass(frozen=True)
class Answers:
    """The responses of one role and their measures: name -> one number per response."""

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    measures: dict[str, list[float]]

    def figures(self) -> dict[str, Figure]:
        """The mean of each measure over the answers, and the shares of distinct responses, prompts and bigrams.

        Answers to equal prompts depend on each other: intervals are over distinct prompts.
        """
        figures = {name: self._figure(name, rows) for name, rows in with_figure(self.measures).items()}
        n, texts = len(self.responses), {"distinct": self.responses, "distinct_prompts": self.prompts}
        shares = {name: len(set(each)) / n for name, each in texts.items()}
        shares["distinct_2"] = distinct_ngrams(self.responses, 2)
        return figures | {name: Figure(value, n, None) for name, value in shares.items()}

    def _figure(self, name: str, rows: list[float]) -> Figure:
        at, interval = present(name, rows), bootstrap_mean if name in AMOUNTS else share
        return interval([rows[i] for i in at], [self.prompts[i] for i in at])


@dataclass(frozen=True)
class Evaluation:
    """Answers of the reference (the SFT policy) and of the policy to the same prompts."""

    reference: Answers
    policy: Answers

    def paired(self) -> Evaluation:
        """The same with NaN scores for both roles of a prompt that was not scored for both."""
        roles = (self.reference.measures, self.policy.measures)
        both = {
            name: [isnan(a) or isnan(b) for a, b in zip(*(measures[name] for measures in roles), strict=True)]
            for name in SCORED
            if name in roles[0]
        }

        def blanked(answers: Answers) -> Answers:
            rows = {n: [nan if out else x for x, out in zip(answers.measures[n], both[n], strict=True)] for n in both}
            return replace(answers, measures=answers.measures | rows)

        return Evaluation(blanked(self.reference), blanked(self.policy))

    def improvement(self) -> dict[str, Figure]:
        """Policy minus reference, prompt by prompt, for the scores."""
        return {
            name: bootstrap_mean([a - b for _, a, b in rows], [prompt for prompt, _, _ in rows])
            for name, rows in self._scores().items()
        }

    def win_rate(self) -> dict[str, Figure]:
        """Share of prompts on which the policy's answer scores higher than the reference's, ties counted a half."""
        return {
            name: share([(a > b) + (a == b) / 2 for _, a, b in rows], [prompt for prompt, _, _ in rows])
            for name, rows in self._scores().items()
        }

    def _scores(self) -> dict[str, list[tuple[str, float, float]]]:
        """Score name -> (prompt, policy, reference) of the prompts scored for both; names without any are left out."""
        before, after = self.reference.measures, self.policy.measures
        scores = {
            name: list(zip(self.policy.prompts, after[name], before[name], strict=True))
            for name in ("score", "gold")
            if name in after
        }
        scored = {name: [row for row in rows if not isnan(row[1] - row[2])] for name, rows in scores.items()}
        return {name: rows for name, rows in scored.items() if rows}


class Evaluator:
    """Measures both roles on prompts; its own random streams leave those of training unchanged."""

    def __init__(self, maker: ExperienceMaker, corpus: Corpus, seed: int) -> None:
        self.maker, self.corpus, self.seed = maker, corpus, seed

    def evaluate(
        self, roles: Roles, reward: AnyReward, gold_reward: AnyReward | None, prompts: Prompts, batch_idx: int
    ) -> Evaluation:
        """Both roles on one batch of prompts."""
        rewards: dict[str, AnyReward] = {"score": reward} | ({"gold": gold_reward} if gold_reward is not None else {})
        answers = [self.answers(roles, role, rewards, prompts, batch_idx) for role in ("reference", "policy")]
        return Evaluation(*answers)

    def answers(
        self,
        roles: Roles,
        role: Role,
        rewards: Mapping[str, AnyReward],
        prompts: Prompts,
        batch_idx: int,
        kl: bool = True,
    ) -> Answers:
        """One role on one batch of prompts; without `kl` the reference does not run."""
        draws = generator(self.seed, "evaluation", batch_idx, device=prompts.ids.device)
        rollout = self.maker.sample(roles, role, prompts, 0, draws)
        texts = [prompt + response for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)]
        scorer = self.maker.scorer
        measures = {name: scorer.scores(reward, rollout).tolist() for name, reward in rewards.items()}
        greedy = self.maker.sample(roles, role, prompts, 0, None)
        measures |= {
            "greedy_score": scorer.scores(rewards["score"], greedy).tolist(),
            **(self._distances(roles, role, rollout) if kl else {}),
            "response_length": rollout.response_mask.sum(1).float().tolist(),
            "eos_fraction": rollout.finished.float().tolist(),
        }
        return Answers(rollout.prompts, rollout.responses, measures | self.corpus.quality(texts))

    def _distances(self, roles: Roles, role: Role, rollout: Rollout) -> dict[str, list[float]]:
        """`kl`: the sampled log-ratio to the reference, nats per sequence; `reference_nats`: -log pi_ref per token."""
        mine, reference = self._logprobs(roles, role, rollout), self._logprobs(roles, "reference", rollout)
        mask = rollout.response_mask
        kl, nats = masked(k1(mine, reference), mask).sum(1), -masked(reference, mask).sum(1) / mask.sum(1)
        return {"kl": kl.tolist(), "reference_nats": nats.tolist()}

    def _logprobs(self, roles: Roles, role: Role, rollout: Rollout) -> Tensor:
        temperature = self.maker.sampler.temperature
        return self.maker.in_micro_batches(
            lambda micro: roles.distribution(micro, temperature, role).logprobs(), rollout
        )


def merge(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several batches as one; a prompt that was not scored for both roles has no score."""
    return Evaluation(joined([e.reference for e in evaluations]), joined([e.policy for e in evaluations])).paired()


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers to several batches as one."""
    names = parts[0].measures
    return Answers(
        tuple(prompt for part in parts for prompt in part.prompts),
        tuple(response for part in parts for response in part.responses),
        {name: [row for part in parts for row in part.measures[name]] for name in names},
    )


def with_figure(measures: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The measures that at least one answer has. Raises `RewardError` when the reward scored none of the answers."""
    left = {name: rows for name, rows in measures.items() if present(name, rows)}
    if "score" in measures and "score" not in left:
        raise RewardError("the reward could score none of the answers")
    return left


def present(name: str, rows: list[float]) -> list[int]:
    """The answers with this measure: all but those that a reward could not score."""
    return [i for i, row in enumerate(rows) if name not in SCORED or not isnan(row)]
