"""What the choices change in an experience: where the KL counts, scaled scores, greedy baselines, credit per token."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.core.correction import Truncated
from src.core.estimators import RewardToGo
from src.core.kl import ExactKL, KLEstimator, SampledKL, k1, k2, k3
from src.errors import ConfigError
from src.models.roles import Roles
from src.rollout import experience as experience_module
from src.rollout.answering import Responses
from src.rollout.engines.local import LocalEngine
from src.rollout.experience import ExperienceMaker, ReferenceKL
from src.rollout.kl_controller import AdaptiveKL, FixedKL
from src.rollout.shaping import (
    IgnoreMissingEos,
    Normalize,
    NoScaling,
    ScaleByStd,
    ScoreShaping,
    SetMissingEos,
    SubtractMissingEos,
)
from src.types import Experience, Prompts, Rollout
from tests.tiny import (
    FOREIGN_WARNINGS,
    KL_IN_REWARD,
    LORA,
    PROMPTS,
    ScriptedReward,
    assert_rows_close,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    plain_model,
    rows_of,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

KL_IN_LOSS = ReferenceKL(in_reward=False, in_loss=True, estimator=SampledKL(k2))
NO_KL = ReferenceKL(in_reward=False, in_loss=False, estimator=None)
WITHOUT_CRITIC: dict[str, Any] = {"advantage": RewardToGo(1.0), "whiten_advantages": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def roles(base: str) -> Roles:
    """Policy and reference apart, and no critic."""
    return make_roles(base, spread=0.1, critic=False)


def make(
    roles: Roles, maker: ExperienceMaker, reward: Any = None, *, seed: int = 2, prompts: Prompts | None = None
) -> tuple[Experience, dict[str, float]]:
    draws = torch.Generator().manual_seed(seed)
    return maker.make(roles, reward or ScriptedReward(), prompts or make_prompts(PROMPTS), 4, draws)


# --------------------------------------------------------------------------------------------------- without a critic


def names_in(node: Any) -> Iterator[str]:
    """All keys of nested dictionaries and lists."""
    if isinstance(node, dict):
        yield from map(str, node)
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from names_in(value)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_an_estimator_without_values_leaves_no_trace_of_a_critic(base: str, lora: Any, tmp_path: Path) -> None:
    """Checklist 49, 59, 61. Not in the experience, the roles, the optimizers, the log or the checkpoint."""
    roles = make_roles(base, lora, critic=False)
    experience, _ = make(roles, make_maker(**WITHOUT_CRITIC))
    assert experience.old_values is None
    assert experience.returns is None
    assert roles.value_head is None
    assert roles.critic_parameters() == []
    with pytest.raises(RuntimeError, match="without a critic"):
        roles.values(experience.rollout)
    module = make_module(roles, value_loss=None, critic_warmup=0)
    recorder, trainer = fit(module, tmp_path, maker=make_maker(**WITHOUT_CRITIC))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert len(checkpoint["optimizer_states"]) == len(trainer.optimizers) == 1
    assert trainer.global_step == 2 * 2 * 2
    found = {*names_in(checkpoint), *dict(module.named_modules()), *module.state_dict()}
    found |= {name for row in recorder.by_step().values() for name in row}
    assert len(found) > 50
    assert [name for name in found if "critic" in name or "value" in name] == []
    assert set(checkpoint["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------- KL to the reference


@pytest.mark.parametrize(
    ("reference_kl", "coef", "asks"),
    [(NO_KL, 0.0, False), (KL_IN_REWARD, 0.0, False), (KL_IN_LOSS, 0.0, False), (KL_IN_REWARD, 0.1, True),
     (KL_IN_LOSS, 0.1, True)],
    ids=["none", "reward-0", "loss-0", "reward", "loss"],
)  # fmt: skip
def test_without_a_weight_the_reference_is_never_run(
    base: str, reference_kl: ReferenceKL, coef: float, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 31. Through a whole fit; and there is nothing of it in the log."""
    roles, seen = make_roles(base, spread=0.1, critic=False), []
    acting = roles.acting
    monkeypatch.setattr(roles, "acting", lambda role: (seen.append(role), acting(role))[1])
    maker = make_maker(reference_kl=reference_kl, kl_controller=FixedKL(coef), **WITHOUT_CRITIC)
    module = make_module(roles, value_loss=None, reference_kl=reference_kl.estimator)
    recorder, _ = fit(module, tmp_path, maker=maker, iterations=1)
    assert set(seen) == ({"policy", "reference"} if asks else {"policy"})
    logged = recorder.by_step()[1]
    assert {"rollout/kl", "rollout/kl_coef"} & set(logged) == ({"rollout/kl", "rollout/kl_coef"} if asks else set())
    assert ("policy/reference_kl" in logged) == (asks and reference_kl.in_loss)
    assert (make(roles, maker)[0].ref_logprobs is not None) == asks


def plain_kl(kind: str, roles: Roles, rollout: Rollout, temperature: float) -> list[list[float]]:
    """KL(policy || reference) of each token by plain models, without padding."""
    models, result = [plain_model(roles, role) for role in ("policy", "reference")], []
    for row in range(len(rollout.response_ids)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        with torch.no_grad():
            logits = [m(input_ids=torch.tensor([prompt + response])).logits[0].double() for m in models]
        p, q = (torch.log_softmax(x / temperature, 1)[len(prompt) - 1 : -1].tolist() for x in logits)
        result.append([one_kl(kind, p[t], q[t], token) for t, token in enumerate(response)])
    return result


def one_kl(kind: str, p: list[float], q: list[float], token: int) -> float:
    """From the token taken, or over the vocabulary."""
    if kind == "exact":
        return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    d = p[token] - q[token]
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


ESTIMATORS: dict[str, KLEstimator] = {"k1": SampledKL(k1), "k2": SampledKL(k2), "k3": SampledKL(k3), "exact": ExactKL()}


@pytest.mark.parametrize(
    ("kind", "place"),
    [("k1", "reward"), *((kind, "loss") for kind in ESTIMATORS), ("k3", "both"), ("exact", "both")],
)
def test_each_kl_counts_where_it_was_put_and_is_the_one_logged(roles: Roles, kind: str, place: str) -> None:
    """Checklist 14, 16, 18, 28, 30. In the loss it leaves the rewards alone and goes along as a weight."""
    in_reward, in_loss = place in ("reward", "both"), place in ("loss", "both")
    controller = AdaptiveKL(0.7, kl_target=0.01, kl_horizon=100)
    maker = make_maker(
        reference_kl=ReferenceKL(in_reward, in_loss, ESTIMATORS[kind]), kl_controller=controller,
        temperature=0.8, **WITHOUT_CRITIC,
    )  # fmt: skip
    experience, measures = make(roles, maker)
    kls = plain_kl(kind, roles, experience.rollout, 0.8)
    rewards = [[-0.7 * kl * in_reward for kl in row] for row in kls]
    for row, score in zip(rewards, experience.scores.tolist(), strict=True):
        row[-1] += score
    assert max(abs(kl) for row in kls for kl in row) > 0.05
    assert_rows_close(rows_of(experience.rewards, experience.mask), rewards, 1e-5)
    assert not experience.rewards[~experience.mask].any()
    to_go = [[sum(row[t:]) for t in range(len(row))] for row in rewards]
    assert_rows_close(rows_of(experience.advantages, experience.mask), to_go, 1e-5)
    assert measures["rollout/kl"] == pytest.approx(sum(map(sum, kls)) / len(kls), abs=1e-5)
    assert experience.loss_kl_coef == (0.7 if in_loss else 0.0)  # as it was before the controller moved it
    assert measures["rollout/kl_coef"] == 0.7
    assert controller.kl_coef != 0.7


@pytest.mark.parametrize("kind", ["k2", "k3", "exact"])
def test_in_the_reward_alone_only_k1_is_taken(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"needs SampledKL\(k1\)"):
        ReferenceKL(in_reward=True, in_loss=False, estimator=ESTIMATORS[kind])


@pytest.mark.parametrize("rewards", [False, True])
@pytest.mark.parametrize("advantages", [False, True])
def test_the_kl_of_the_loss_is_scaled_like_what_is_whitened(roles: Roles, rewards: bool, advantages: bool) -> None:
    """Checklist 23, 24. By the deviations of the batch before each whitening, by hand."""
    both: dict[str, Any] = {"reference_kl": ReferenceKL(True, True, ExactKL()), "kl_controller": FixedKL(0.7)}
    both |= WITHOUT_CRITIC

    def deviation(x: Tensor, mask: Tensor) -> float:
        return math.sqrt(statistics.variance(x[mask].double().tolist()) + 1e-8)

    expected = 0.7
    if rewards:
        raw, _ = make(roles, make_maker(**(both | {"whiten_advantages": False})))
        expected /= deviation(raw.rewards, raw.mask)
    if advantages:
        raw, _ = make(roles, make_maker(**(both | {"whiten_rewards": rewards, "whiten_advantages": False})))
        expected /= deviation(raw.advantages, raw.mask)
    settings = {"whiten_rewards": rewards, "whiten_advantages": advantages}
    experience, _ = make(roles, make_maker(**(both | settings)))
    assert experience.loss_kl_coef == pytest.approx(expected, rel=1e-4)


def test_without_variance_the_kl_of_the_loss_keeps_its_coefficient() -> None:
    """Equal advantages are whitened to 0, and the reference still pulls."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    whitened, factor = experience_module._whitened(torch.full((2, 3), 0.4), mask, wanted=True)
    assert not whitened.any()
    assert factor == 1


# ------------------------------------------------------------------------------------------ whitened, scaled, shaped


def test_whitened_rewards_have_variance_one_and_keep_their_mean(roles: Roles) -> None:
    """Checklist 23, 39. Over the tokens of the batch, KL and all; the advantages are made of them."""
    raw, _ = make(roles, make_maker(**WITHOUT_CRITIC))
    experience, measures = make(roles, make_maker(whiten_rewards=True, **WITHOUT_CRITIC))
    before = [r for row in rows_of(raw.rewards.double(), raw.mask) for r in row]
    mean, std = statistics.fmean(before), math.sqrt(statistics.variance(before) + 1e-8)
    assert abs(mean) > 1e-2
    assert abs(std - 1) > 1e-2
    rows = rows_of(experience.rewards, experience.mask)
    expected = [[(r - mean) / std + mean for r in row] for row in rows_of(raw.rewards.double(), raw.mask)]
    assert_rows_close(rows, expected, 1e-5)
    whitened = [r for row in rows for r in row]
    assert statistics.fmean(whitened) == pytest.approx(mean, abs=1e-5)
    assert statistics.variance(whitened) == pytest.approx(1, abs=1e-4)
    assert not experience.rewards[~experience.mask].any()
    to_go = [[sum(row[t:]) for t in range(len(row))] for row in expected]
    assert_rows_close(rows_of(experience.advantages, experience.mask), to_go, 1e-4)
    # the metric is what its description says, score minus KL: the mean over tokens is kept, and so is that of the sums
    assert measures["rollout/reward"] == pytest.approx(statistics.fmean(map(sum, expected)), abs=1e-4)
    assert measures["rollout/reward"] == pytest.approx(
        statistics.fmean(map(sum, rows_of(raw.rewards.double(), raw.mask))), abs=1e-4
    )


class Noting:
    """A scaling that keeps what it was given, and when."""

    def __init__(self, scaling: NoScaling) -> None:
        self.scaling, self.calls = scaling, []

    @property
    def unit(self) -> float:
        return self.scaling.unit

    def update(self, scores: Tensor) -> None:
        self.calls.append(("update", scores.tolist()))
        self.scaling.update(scores)

    def __call__(self, scores: Tensor) -> Tensor:
        self.calls.append(("apply", scores.tolist()))
        return self.scaling(scores)


MISSING = {
    "ignore": (IgnoreMissingEos(), lambda s, f: s),
    "set": (SetMissingEos(-2.0), lambda s, f: s if f else -2.0),
    "subtract": (SubtractMissingEos(2.0), lambda s, f: s if f else s - 2.0),
}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("scaling", [ScaleByStd, Normalize])
def test_scores_are_scaled_then_clipped_then_lowered_and_the_kl_comes_last(
    roles: Roles, scaling: Any, missing: str
) -> None:
    """Checklist 20, 21, 22. The moments are those of all raw scores so far, this batch's included."""
    rule, lowered = MISSING[missing]
    noting = Noting(scaling())
    maker = make_maker(
        shaping=ScoreShaping(noting, 0.9, rule), kl_controller=FixedKL(0.7), **WITHOUT_CRITIC
    )  # fmt: skip
    past: list[float] = []
    for seed in (5, 9):
        experience, measures = make(roles, maker, seed=seed)
        raw, finished = experience.scores.double().tolist(), experience.rollout.finished.tolist()
        assert noting.calls == [("update", raw), *[("apply", raw)] * 2]  # to the scores, and for their credits
        noting.calls.clear()
        past += raw
        mean = statistics.fmean(past) if scaling is Normalize else 0.0
        scaled = [(score - mean) / statistics.stdev(past) for score in raw]
        assert any(abs(score) > 0.9 for score in scaled)
        assert len(set(finished)) == 2
        shaped = [lowered(max(-0.9, min(0.9, s)), f) for s, f in zip(scaled, finished, strict=True)]
        kls = rows_of(experience.old_logprobs.double() - experience.ref_logprobs, experience.mask)
        rewards = [[-0.7 * kl for kl in row] for row in kls]
        for row, score in zip(rewards, shaped, strict=True):
            row[-1] += score
        assert_rows_close(rows_of(experience.rewards, experience.mask), rewards, 1e-5)
        assert measures["rollout/score"] == pytest.approx(statistics.fmean(raw), abs=1e-6)
        assert measures["rollout/shaped_score"] == pytest.approx(statistics.fmean(shaped), abs=1e-5)


# ---------------------------------------------------------------------------------------- what another policy sampled


class Tempered(LocalEngine):
    """Says that each token was `factor` as probable as it is: an engine that is off, by a known amount."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def sample(self, *given: Any) -> Responses:
        ids, mask, logprobs, finished = super().sample(*given)
        return ids, mask, (logprobs + math.log(self.factor)) * mask, finished


def test_the_policy_that_sampled_is_measured_and_corrected(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """pi_old / pi_behavior is 1 / factor for every token; k3 of it is 1 / factor - 1 + log factor."""
    monkeypatch.setattr(experience_module, "require_agreement", lambda *_: None)
    ratio = 1 / 0.8
    options: dict[str, Any] = WITHOUT_CRITIC | {"engine": Tempered(0.8)}
    experience, measures = make(roles, make_maker(**options))
    assert experience.correction is None
    assert measures["rollout/behavior_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-5)
    assert measures["rollout/behavior_ratio_max"] == pytest.approx(ratio, abs=1e-4)
    assert not {"rollout/effective_sample_size", "rollout/capped_fraction"} & measures.keys()
    for cap, weight, capped in ((2.0, ratio, 0.0), (1.2, 1.2, 1.0)):
        experience, measures = make(roles, make_maker(correction=Truncated(cap), **options))
        assert experience.correction is not None
        torch.testing.assert_close(experience.correction, weight * experience.mask.float(), rtol=1e-4, atol=0)
        assert measures["rollout/capped_fraction"] == capped
        assert measures["rollout/effective_sample_size"] == pytest.approx(1, abs=1e-6)
