"""Prompts in, experience out: sample, score, compare with the reference, credit each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from src.core.estimators import GAE, Estimator
from src.core.kl import KLEstimator, SampledKL, k1
from src.core.masking import masked, whiten, whitening_scale
from src.core.rewards import token_rewards
from src.errors import ConfigError, NonFiniteError, RewardError, require
from src.models.roles import Role, Roles
from src.models.sharding import gathered
from src.rewards.answers import reward_name
from src.rollout.answering import answered, prompts_of, sampled
from src.rollout.engines.interface import RolloutEngine
from src.rollout.engines.local import LocalEngine
from src.rollout.finite_rows import ModelOutputs, keep_finite
from src.rollout.kl_controller import FixedKL, KLController
from src.rollout.measures import Correction, corrected, describe
from src.rollout.minibatches import join
from src.rollout.oom_retry import OomRetry
from src.rollout.sampler_check import require_agreement
from src.rollout.sampling import Sampler
from src.rollout.scoring import Scored, Scorer
from src.rollout.shaping import NoScaling, ScoreShaping, SetMissingEos
from src.types import AnyReward, Episodes, Experience, Prompts, Rollout, select
from src.utils.distributed import gather
from src.utils.nonfinite import FiniteGuard
from src.utils.phases import phase


@dataclass(frozen=True)
class ReferenceKL:
    """Where KL(policy || reference) enters: as a reward per token, a term of the policy's loss, both, or nowhere.

    The gradient of the expected KL of a response is that of both together; k1 has it in the reward alone, as its part
    in the loss is 0 in expectation. docs/objectives.md says what each choice optimizes.
    """

    in_reward: bool
    in_loss: bool
    estimator: KLEstimator | None

    def __post_init__(self) -> None:
        """Refuse estimators that would lose most of the KL's gradient."""
        if self.in_reward and not self.in_loss and not (self.estimator and self.estimator.is_log_ratio):
            raise ConfigError("ReferenceKL in the reward alone needs SampledKL(k1); others need in_loss=True as well")


class ExperienceMaker:
    """Makes the experience of one PPO iteration; KL coefficient, running moments and baselines are its only state."""

    def __init__(
        self,
        sampler: Sampler = Sampler(),
        *,
        scorer: Scorer = Scorer(),
        shaping: ScoreShaping | None = None,
        reference_kl: ReferenceKL = ReferenceKL(in_reward=True, in_loss=False, estimator=SampledKL(k1)),
        kl_controller: KLController | None = None,
        advantage: Estimator = GAE(gamma=1.0, lam=0.95, critic_lam=0.95),
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        batch_size: int = 64,
        engine: RolloutEngine | None = None,
        check_every: int = 10,
        correction: Correction | None = None,
    ) -> None:
        self.sampler, self.scorer = sampler, scorer
        self.engine, self.correction = engine or LocalEngine(), correction
        self.shaping = shaping or ScoreShaping(NoScaling(), None, SetMissingEos(-1.0))
        self.fitting = OomRetry(batch_size, "rollout.scoring_batch_size")
        self.reference_kl, self.advantage = reference_kl, advantage
        self.kl_controller = kl_controller or FixedKL(0.1)
        self.whiten_rewards, self.whiten_advantages = whiten_rewards, whiten_advantages
        self.check_every = check_every
        require(check_every >= 1, "check_every", check_every, "at least 1")
        self._drawn = 0  # batches since this process started, so that the first one after a resume is checked too

    def make(
        self,
        roles: Roles,
        reward: AnyReward,
        prompts: Prompts,
        policy_version: int,
        generator: torch.Generator,
        nonfinite: FiniteGuard | None = None,
    ) -> tuple[Experience, dict[str, float]]:
        """The experience of one batch of prompts that the policy answers now, and its metrics."""
        return self.experience(
            roles, reward, self.draw(roles, prompts, policy_version, generator), policy_version, nonfinite
        )

    @phase("scoring")
    def experience(
        self, roles: Roles, reward: AnyReward, drawn: Rollout, policy_version: int, nonfinite: FiniteGuard | None = None
    ) -> tuple[Experience, dict[str, float]]:
        """The experience of responses, for a policy of `policy_version` iterations that may not have drawn them.

        1. responses were drawn; 2. score them (and drop those that cannot be scored, if the scorer allows it); 3.
        logprobs of policy and reference, values (and drop rows that are not finite); score the greedy responses if the
        estimator compares with them; 4. shape the scores; 5. rewards per token with the KL to the reference (scaled to
        variance 1 if `whiten_rewards`); 6. advantages and returns; 7. whiten the advantages (if `whiten_advantages`);
        8. weigh the tokens by the policy that sampled them (if there is a `correction`); update the KL coefficient.

        `nonfinite` drops rows whose logprobs or values are not finite, up to its limit; None: the first such row
        raises `NonFiniteError`.
        """
        # 1-3
        with phase("reward"):
            scored = self.scorer.score(reward, drawn)
        scored = replace(scored, rollout=self.with_trunk(roles, scored.rollout))
        outputs = self._model_outputs(roles, scored.rollout)
        scored, outputs = keep_finite(scored, outputs, nonfinite or FiniteGuard(0, None), policy_version + 1)
        scored, outputs, greedy = self._with_greedy(roles, reward, prompts_of(drawn), scored, outputs)
        rollout, scores, mask = scored.rollout, scored.scores, scored.rollout.response_mask
        kl_coef = self.kl_controller.kl_coef
        # 4, 5
        self.shaping.scaling.update(scores)
        shaped = self.shaping(scores, rollout.finished)
        in_reward = kl_coef if self.reference_kl.in_reward else 0.0
        rewards = token_rewards(shaped, self.shaping.of_credit(scores, scored.credit), outputs.kl, mask, in_reward)
        rewards, factor = _whitened(rewards, mask, self.whiten_rewards, shift_mean=False)
        # 6, 7
        episodes = Episodes(
            rewards=rewards, mask=mask, group_ids=rollout.group_ids, old_values=outputs.values,
            greedy_scores=greedy and self.shaping(*greedy),
        )  # fmt: skip
        advantages, returns = self.advantage.advantages(episodes), self.advantage.returns(episodes)
        self.advantage.update(episodes)
        advantages, factor_of_advantages = _whitened(advantages, mask, self.whiten_advantages)
        loss_kl_coef = kl_coef * factor * factor_of_advantages if self.reference_kl.in_loss else 0.0
        # 8
        weights, mismatch = corrected(self.correction, rollout, outputs.logprobs)
        measures = describe(scored, shaped, rewards) | mismatch | self._steer(outputs)
        return Experience(
            rollout=rollout, old_logprobs=outputs.logprobs, ref_logprobs=outputs.ref_logprobs,
            old_values=outputs.values, scores=scores, rewards=rewards, advantages=advantages, returns=returns,
            loss_kl_coef=loss_kl_coef, correction=weights,
        ), measures  # fmt: skip

    def _check_engine(self, roles: Roles, rollout: Rollout) -> None:
        """Compare the engine with the path that trains; rows that are not finite are left to `keep_finite`."""
        temperature = self.sampler.temperature
        logprobs = self.in_micro_batches(lambda micro: roles.distribution(micro, temperature).logprobs(), rollout)
        rows = (logprobs.isfinite() & rollout.behavior_logprobs.isfinite()).all(1).nonzero().flatten()
        if len(rows):
            require_agreement(roles, select(rollout, rows), logprobs[rows], temperature, self.engine.fault)

    def _steer(self, outputs: ModelOutputs) -> dict[str, float]:
        """Update the controller with the KL per sequence; returns its metrics, empty without a reference."""
        if outputs.ref_logprobs is None:
            return {}
        sequence_kl, kl_coef = outputs.kl.sum(1).mean().item(), self.kl_controller.kl_coef
        self.kl_controller.update(sequence_kl, len(outputs.kl))
        return {"rollout/kl": sequence_kl, "rollout/kl_coef": kl_coef}

    def state_dict(self) -> dict[str, Any]:
        """State of the next iteration besides weights."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        return {
            "kl_controller": self.kl_controller,
            "score_scaling": self.shaping.scaling,
            "advantage": self.advantage,
        }

    @phase("rollout")
    @torch.no_grad()
    def draw(self, roles: Roles, prompts: Prompts, policy_version: int, generator: torch.Generator) -> Rollout:
        """Responses of the policy as it is now, to learn from, drawn by the engine for any later `experience`.

        In the first batch, and in every `check_every`-th after it, the engine's log-probabilities are compared with
        those of the path that trains. Raises `ModelError` when they differ.
        """
        self.engine.take(roles, policy_version)
        respond = partial(self.engine.sample, roles, prompts, self.sampler, generator)
        with roles.acting("policy") as lm, gathered(lm):
            rollout = answered(roles, prompts, respond, policy_version)
        if self._drawn % self.check_every == 0:
            self._check_engine(roles, rollout)
        self._drawn += 1
        return rollout

    @torch.no_grad()
    def sample(
        self, roles: Roles, role: Role, prompts: Prompts, policy_version: int, generator: torch.Generator | None
    ) -> Rollout:
        """Responses of `role`, to measure, drawn from `generator` by this process (None: greedy)."""
        respond = partial(sampled, roles, role, prompts, self.sampler, generator)
        with roles.acting(role) as lm, gathered(lm):
            return answered(roles, prompts, respond, policy_version)

    def _with_greedy(
        self, roles: Roles, reward: AnyReward, prompts: Prompts, scored: Scored, outputs: ModelOutputs
    ) -> tuple[Scored, ModelOutputs, tuple[Tensor, Tensor] | None]:
        """Score and end of the greedy response to each row's prompt, (B,) each; one response per prompt.

        None if the estimator does not use them. Groups whose greedy response cannot be scored are dropped if the
        scorer allows it. Raises `NonFiniteError`.
        """
        if not self.advantage.needs_greedy:
            return scored, outputs, None
        rollout = scored.rollout
        groups, _ = prompts.group_ids.unique(return_inverse=True)
        first = (prompts.group_ids == groups.unsqueeze(1)).int().argmax(dim=1)
        with phase("rollout"):
            greedy = self.sample(roles, "policy", select(prompts, first), 0, None)
        of_row = torch.searchsorted(groups, rollout.group_ids)
        for row in of_row[~greedy.behavior_logprobs.isfinite().all(1)[of_row]].tolist():
            raise NonFiniteError(f"the logits of the greedy response to {greedy.prompts[row]!r} are not finite")
        with phase("reward"):
            scores = self.scorer.scores(reward, greedy)[of_row]
        kept = scores.isfinite().nonzero().flatten()
        if not len(kept):
            raise RewardError(f"reward {reward_name(reward)} could score no greedy response")
        return scored.only(kept), outputs.only(kept), (scores[kept], greedy.finished[of_row][kept])

    @torch.no_grad()
    def with_trunk(self, roles: Roles, rollout: Rollout) -> Rollout:
        """The rollout with the output of the layers below all adapters, for every later pass; unchanged without any.

        It holds B (P + T) H numbers for the whole batch, until the updates of the iteration end.
        """
        if not roles.shares_trunk:
            return rollout

        def work() -> list[tuple[Tensor, int, Tensor]]:
            micros = self.fitting.micro_batches(rollout)
            return [(index, micro.prompt_ids.shape[1], roles.trunk(micro)) for index, micro in micros]

        pieces = [piece for own in gather(self.fitting.attempt(work, len(rollout.prompts))) for piece in own]
        prompt, total = rollout.prompt_ids.shape[1], rollout.prompt_ids.shape[1] + rollout.response_ids.shape[1]
        trunk = pieces[0][2].new_zeros(len(rollout.prompts), total, pieces[0][2].shape[2])
        for index, width, states in pieces:
            trunk[index, prompt - width : prompt - width + states.shape[1]] = states
        return replace(rollout, trunk=trunk)

    @torch.no_grad()
    def _model_outputs(self, roles: Roles, rollout: Rollout) -> ModelOutputs:
        """Logprobs of policy and reference, their KL, and values, by the code path that trains."""
        pieces = self.fitting.attempt(lambda: self._score_micro_batches(roles, rollout), len(rollout.prompts))
        shape, ranks = rollout.response_mask.shape, gather(pieces)
        all_pieces = {name: [piece for own in ranks for piece in own[name]] for name in pieces}
        whole = {name: join(parts, shape) for name, parts in all_pieces.items() if parts}
        return ModelOutputs(
            logprobs=whole["logprobs"],
            ref_logprobs=whole.get("ref_logprobs"),
            kl=whole.get("kl", torch.zeros_like(whole["logprobs"])),
            values=whole.get("values"),
        )

    def _score_micro_batches(self, roles: Roles, rollout: Rollout) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The same of this rank's rows, by name, one tensor per micro-batch."""
        estimator, temperature = self.reference_kl.estimator, self.sampler.temperature
        ask_reference = estimator is not None and self.kl_controller.kl_coef > 0
        pieces: dict[str, list[tuple[Tensor, Tensor]]] = {"logprobs": [], "ref_logprobs": [], "kl": [], "values": []}
        for index, micro in self.fitting.micro_batches(rollout):
            policy = roles.distribution(micro, temperature)
            logprobs = policy.logprobs()
            pieces["logprobs"].append((index, logprobs))
            if ask_reference and estimator is not None:
                reference = roles.distribution(micro, temperature, "reference")
                ref_logprobs = reference.logprobs()
                kl = estimator(logprobs, ref_logprobs, partial(policy.kl, reference))
                pieces["ref_logprobs"].append((index, ref_logprobs))
                pieces["kl"].append((index, masked(kl, micro.response_mask)))
            if self.advantage.needs_values:
                pieces["values"].append((index, roles.values(micro)))
        return pieces

    @torch.no_grad()
    def in_micro_batches(self, function: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
        """`function` of the whole rollout, (B, T), computed `batch_size` rows at a time; fewer if memory runs out."""

        def work() -> list[tuple[Tensor, Tensor]]:
            return [(index, function(micro)) for index, micro in self.fitting.micro_batches(rollout)]

        pieces = self.fitting.attempt(work, len(rollout.prompts))
        return join([piece for own in gather(pieces) for piece in own], rollout.response_mask.shape)


def _whitened(x: Tensor, mask: Tensor, wanted: bool, shift_mean: bool = True) -> tuple[Tensor, float]:
    """x (B, T), whitened if `wanted`, and the factor by which it was multiplied; 1 where it has no variance."""
    if not wanted:
        return x, 1.0
    return whiten(x, mask, shift_mean=shift_mean), whitening_scale(x, mask).item() or 1.0
