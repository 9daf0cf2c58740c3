"""The policy's loss with its KL terms against a computation row by row, and the weight of KL(old || new) over a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.checkpointing.checkpoint import IterationCheckpoint, checkpoints
from src.core.kl import ExactKL, KLEstimator, SampledKL, k2, k3
from src.core.policy_losses import ClippedSurrogate, Surrogate
from src.models.roles import Roles
from src.modules.objective import PolicyObjective
from src.modules.weighted_means import WeightedMeans
from src.rollout.kl_controller import DoublingKL, FixedKL
from src.rollout.minibatches import micro_batches
from src.types import Experience
from tests.tiny import (
    FOREIGN_WARNINGS,
    LORA,
    fit,
    make_maker,
    make_module,
    make_roles,
    plain_model,
    ragged_experience,
    ragged_rollout,
    same_bits,
    snapshot,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

TEMPERATURE, ENTROPY, OLD, REFERENCE = 0.8, 0.3, 0.7, 0.4
KINDS = pytest.mark.parametrize(
    ("lora", "checkpointing"), [(LORA, False), (LORA, True), (None, False)], ids=["lora", "lora-checkpointing", "full"]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


@dataclass
class Case:
    """A policy that moved away from the one it is compared with, and plain copies of both and of the reference."""

    roles: Roles
    objective: PolicyObjective
    experience: Experience
    weights: Tensor
    old: Any
    new: Any
    reference: Any

    def run(self) -> tuple[float, dict[str, Tensor], dict[str, float]]:
        """(loss, gradient by name, what was logged), three rows at a time."""
        averages, total = WeightedMeans(), 0.0
        for index, micro in micro_batches(self.experience, 3):
            loss = self.objective.loss(micro, self.weights[index, : micro.mask.shape[1]], averages)
            loss.backward()
            total += loss.item()
        module = self.roles.peft if hasattr(self.roles, "peft") else self.roles.models["policy"]
        mine = {id(p) for p in self.roles.policy_parameters()}
        assert all(p.grad is None or not p.grad.any() for p in self.roles.parameters() if id(p) not in mine)
        return total, {n: p.grad for n, p in module.named_parameters() if id(p) in mine}, averages.compute()


def make_case(base: str, lora: Any, checkpointing: bool = False, **changes: Any) -> Case:
    """Old logprobs are those of the remembered policy; whatever lies outside the mask is NaN."""
    plain = {"old_kl": SampledKL(k3), "old_kl_coef": 0.0, "reference_kl": None, "loss_kl_coef": 0.0} | changes
    roles = make_roles(base, lora, spread=0.1, dtype="float64", gradient_checkpointing=checkpointing).double()
    objective = PolicyObjective(
        roles, ClippedSurrogate(0.2, 0.2), plain["old_kl"], FixedKL(plain["old_kl_coef"]), plain["reference_kl"],
        ENTROPY, TEMPERATURE,
    )  # fmt: skip
    rollout, old, reference = ragged_rollout(rows=8), plain_model(roles, "policy"), plain_model(roles, "reference")
    objective.remember_old_policy()
    noise = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in roles.policy_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    draft = ragged_experience(rollout, torch.zeros(rollout.response_mask.shape).double(), torch.zeros(8, 6))
    weights = torch.rand(rollout.response_mask.shape, generator=noise).double() / 20
    logs = {name: taken(model, draft) for name, model in (("old_logprobs", old), ("ref_logprobs", reference))}
    nan = {n: x.where(draft.mask, float("nan")) for n, x in (logs | {"advantages": draft.advantages}).items()}
    experience = replace(draft, loss_kl_coef=plain["loss_kl_coef"], **nan)
    return Case(roles, objective, experience, weights, old, plain_model(roles, "policy"), reference)


def rows(model: Any, experience: Experience) -> list[Tensor]:
    """log pi(v | s_t), (length, V) for each row, by whole forwards without padding."""
    result, rollout = [], experience.rollout
    for row in range(len(experience)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        response = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / TEMPERATURE
        result.append(F.log_softmax(logits[len(prompt) - 1 : -1], dim=1))
    return result


@torch.no_grad()
def taken(model: Any, experience: Experience) -> Tensor:
    """log pi(a_t | s_t), (B, T)."""
    result = torch.zeros(experience.mask.shape, dtype=torch.float64)
    for row, logs in enumerate(rows(model, experience)):
        for t in range(len(logs)):
            result[row, t] = logs[t, experience.rollout.response_ids[row, t]]
    return result


def plain_kl(kind: str, p: Tensor, q: Tensor, token: Tensor) -> Tensor:
    """KL(p || q) at one place, from the token that was taken or over the whole vocabulary."""
    d = p[token] - q[token]
    return {"k2": d * d / 2, "k3": torch.exp(-d) - 1 + d, "exact": sum(p.exp() * (p - q))}[kind]


def plain_loss(
    case: Case, old_kind: str, old_coef: float, ref_kind: str, ref_coef: float
) -> tuple[Tensor, float, float]:
    """(weighted sum over the tokens, mean KL(old || new), mean KL(new || reference)) of the plain models."""
    total, old_kls, ref_kls = torch.zeros((), dtype=torch.float64), [], []
    with torch.no_grad():
        before, frozen = rows(case.old, case.experience), rows(case.reference, case.experience)
    for row, now in enumerate(rows(case.new, case.experience)):
        for t, p in enumerate(now):
            a = case.experience.rollout.response_ids[row, t]
            old, ref = before[row][t], frozen[row][t]
            advantage, ratio = case.experience.advantages[row, t], (p[a] - old[a]).exp()
            loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + ENTROPY * (p.exp() * p).sum()
            old_kls.append(plain_kl(old_kind, old, p, a))
            ref_kls.append(plain_kl(ref_kind, p, ref, a))
            total = total + case.weights[row, t] * (loss + old_coef * old_kls[-1] + ref_coef * ref_kls[-1])
    return total, torch.stack(old_kls).mean().item(), torch.stack(ref_kls).mean().item()


def assert_same(case: Case, expected: Tensor, *, old_kl: float, reference_kl: float | None) -> None:
    """Value, gradient of every policy parameter, and both logged KLs."""
    loss, gradient, logged = case.run()
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    expected.backward()
    theirs = {name: p.grad for name, p in case.new.named_parameters()}
    assert sum(g.abs().max().item() > 1e-4 for g in gradient.values()) >= 8
    for name, mine in gradient.items():
        torch.testing.assert_close(mine, theirs[name], atol=1e-8, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert logged["policy/old_kl"] == pytest.approx(old_kl, abs=1e-10)
    assert logged.get("policy/reference_kl") == (reference_kl and pytest.approx(reference_kl, abs=1e-10))


ESTIMATORS: dict[str, KLEstimator] = {"k2": SampledKL(k2), "k3": SampledKL(k3), "exact": ExactKL()}


@pytest.mark.parametrize(
    ("old_kind", "old_coef", "kind", "coef"),
    [("k3", 0, "k2", REFERENCE), ("k3", 0, "k3", REFERENCE), ("k3", 0, "exact", REFERENCE), ("k3", OLD, "k2", 0),
     ("exact", OLD, "k2", 0), ("exact", OLD, "exact", REFERENCE)],
    ids=["k2", "k3", "exact", "old-k3", "old-exact", "old-exact-and-exact"],
)  # fmt: skip
@KINDS
def test_each_kl_in_the_loss_is_that_of_plain_models(
    base: str, old_kind: str, old_coef: float, kind: str, coef: float, lora: Any, checkpointing: bool
) -> None:
    """Checklist 13, 29, 30, 47, 57. KL(old || new) and KL(new || reference), logged as they were trained on.

    The gradient reaches the policy alone, NaN outside the mask reaches nothing, and looking back at the old policy,
    the one that was remembered before it moved, leaves the new one where it is.
    """
    changes = {"old_kl": ESTIMATORS[old_kind], "reference_kl": ESTIMATORS[kind]}
    case = make_case(base, lora, checkpointing, old_kl_coef=old_coef, loss_kl_coef=coef, **changes)
    now = snapshot(case.roles.policy_parameters())
    expected, old_kl, reference_kl = plain_loss(case, old_kind, old_coef, kind, coef)
    assert min(old_kl, reference_kl) > 1e-2
    assert_same(case, expected, old_kl=old_kl, reference_kl=reference_kl if coef else None)
    assert same_bits(now, case.roles.policy_parameters())


@pytest.mark.parametrize("kind", ["k3", "exact"])
def test_what_is_logged_is_what_was_trained_on(base: str, kind: str) -> None:
    """Checklist 30. The loss rises by coefficient times the logged mean when every token weighs the same."""
    losses, logs = [], []
    for on in (0, 1):
        case = make_case(base, LORA, old_kl=ESTIMATORS[kind], old_kl_coef=on * OLD, reference_kl=ESTIMATORS[kind],
                         loss_kl_coef=on * REFERENCE)  # fmt: skip
        case.weights = case.experience.mask.double() / case.experience.mask.sum()
        loss, _, logged = case.run()
        losses.append(loss)
        logs.append(logged)
    added = OLD * logs[1]["policy/old_kl"] + REFERENCE * logs[1]["policy/reference_kl"]
    assert added > 1e-2
    assert losses[1] - losses[0] == pytest.approx(added, abs=1e-10)
    assert logs[0]["policy/old_kl"] == logs[1]["policy/old_kl"]


@pytest.mark.parametrize(("coef", "asked"), [(0.0, []), (REFERENCE, ["reference"] * 3)])
def test_only_an_exact_kl_with_a_weight_asks_the_reference(
    base: str, coef: float, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 31. Once for each of three micro-batches, or never."""
    case = make_case(base, LORA, reference_kl=ExactKL(), loss_kl_coef=coef)
    acting, seen = case.roles.acting, []
    monkeypatch.setattr(case.roles, "acting", lambda role: (seen.append(role), acting(role))[1])
    logged = case.run()[2]
    assert [role for role in seen if role != "policy"] == asked
    assert ("policy/reference_kl" in logged) == (coef > 0)


class NotingKL(DoublingKL):
    """Keeps the coefficient before each update and what it was told."""

    def update(self, kl: float, episodes: int) -> None:
        self.__dict__.setdefault("told", []).append((self.kl_coef, kl, episodes))
        super().update(kl, episodes)


class NotingLoss(Surrogate):
    """Keeps sum and number of k3 of every call, worked out anew."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        d = (old_logprobs - logprobs.detach())[mask].double()
        self.__dict__.setdefault("seen", []).append((((-d).exp() - 1 + d).sum().item(), len(d)))
        return super().__call__(logprobs, old_logprobs, advantages, mask)


def penalized(base: str, tmp_path: Path, start: str | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Three iterations of two epochs with the penalty; (controller, loss, recorder), from checkpoint `start` on."""
    controller, loss = NotingKL(0.5, changes.pop("kl_target", 1e-4)), NotingLoss()
    module = make_module(
        make_roles(base), iterations=3, old_kl_controller=controller, policy_loss=loss, lr=0.02, **changes
    )
    recorder, _ = fit(
        module, tmp_path, maker=make_maker(), iterations=3, ckpt_path=start,
        callbacks=(IterationCheckpoint(str(tmp_path), every=1, keep=9),),
    )  # fmt: skip
    return controller, loss, recorder


def test_the_weight_of_the_penalty_is_steered_once_an_iteration(base: str, tmp_path: Path) -> None:
    """Checklist 30, 57. By the mean over all tokens of the last epoch; the log has the mean over both epochs."""
    controller, loss, recorder = penalized(base, tmp_path)
    assert len(loss.seen) == 3 * 2 * 4  # iterations, epochs, micro-batches
    assert [episodes for _, _, episodes in controller.told] == [8, 8, 8]
    for iteration, (coef, kl, _) in enumerate(controller.told):
        sums, counts = zip(*loss.seen[8 * iteration : 8 * iteration + 8], strict=True)
        assert coef == 0.5 * 2**iteration
        assert kl > 1.5e-4
        assert kl == pytest.approx(sum(sums[4:]) / sum(counts[4:]), rel=1e-4)
        logged = recorder.by_step()[iteration + 1]["policy/old_kl"]
        assert logged == pytest.approx(sum(sums) / sum(counts), rel=1e-4)
        assert logged != pytest.approx(kl, rel=1e-2)
    assert controller.kl_coef == 4.0


def test_the_weight_of_the_penalty_is_part_of_a_checkpoint(base: str, tmp_path: Path) -> None:
    """Checklist 57, 61. A run taken up after the first iteration is told the same, with the same weights."""
    whole = penalized(base, tmp_path / "whole")[0]
    (first,) = [path for path in checkpoints(tmp_path / "whole") if path.stem == "iteration-1"]
    rest = penalized(base, tmp_path / "rest", first)[0]
    assert rest.told == whole.told[1:]
    assert rest.kl_coef == whole.kl_coef == 4.0


def test_an_early_stop_still_steers_and_logs(base: str, tmp_path: Path) -> None:
    """Checklist 55, 57. The minibatch that went too far is measured and not learned from."""
    controller, loss, recorder = penalized(base, tmp_path, early_stop_kl=1e-5)
    calls = iter(loss.seen)
    for (_, kl, _), row in zip(controller.told, recorder.by_step().values(), strict=True):
        assert row["policy/early_stop"] == 1
        assert row["train/optimizer_steps"] == 1
        sums, counts = zip(*[next(calls) for _ in range(4)], strict=True)
        assert kl == pytest.approx(sum(sums) / sum(counts), rel=1e-4)
        assert row["policy/old_kl"] == pytest.approx(kl, rel=1e-6)
    assert len(controller.told) == 3


def test_the_remembered_policy_is_that_of_the_iterations_start(base: str, tmp_path: Path) -> None:
    """Checklist 5, 57. The exact KL(old || new) is 0 before the first step of each iteration, and not after."""
    seen: list[float] = []

    class Noting(ExactKL):
        def __call__(self, *arguments: Any) -> Tensor:
            kl = super().__call__(*arguments)
            seen.append(kl.detach().abs().max().item())
            return kl

    module = make_module(
        make_roles(base), old_kl=Noting(), old_kl_controller=FixedKL(1.0), minibatch_size=8, micro_batch_size=8
    )
    recorder, _ = fit(module, tmp_path, maker=make_maker())
    assert len(seen) == 4
    assert max(seen[0], seen[2]) < 1e-6
    assert min(seen[1], seen[3]) > 1e-4
    assert all(row["policy/old_kl"] > 0 for row in recorder.by_step().values())


@pytest.mark.parametrize("weight", [None, 1.0])
def test_a_weight_of_one_changes_no_bit(base: str, weight: float | None) -> None:
    case, plain = make_case(base, LORA), make_case(base, LORA)
    ones = None if weight is None else torch.full_like(case.experience.advantages, weight) * case.experience.mask
    case.experience = replace(case.experience, correction=ones)
    (total, gradient, logged), (same, its_gradient, its_log) = case.run(), plain.run()
    assert (total, logged) == (same, its_log)
    assert all(torch.equal(gradient[name], its_gradient[name]) for name in gradient)


def test_a_correction_multiplies_the_policy_loss_of_each_token_alone(base: str) -> None:
    """Not the KL to the old policy, nor the entropy: with an advantage of 0 those are all there is."""
    draws = torch.Generator().manual_seed(5)
    case = make_case(base, LORA, old_kl_coef=OLD)
    weights = torch.rand(case.experience.mask.shape, generator=draws).double() * case.experience.mask
    corrected, scaled = make_case(base, LORA, old_kl_coef=OLD), make_case(base, LORA, old_kl_coef=OLD)
    corrected.experience = replace(corrected.experience, correction=weights)
    scaled.experience = replace(scaled.experience, advantages=weights * scaled.experience.advantages)
    (total, gradient, _), (same, its_gradient, _) = corrected.run(), scaled.run()
    assert total == pytest.approx(same, abs=1e-12)  # the clipped loss is of degree 1 in the advantage
    for name, mine in gradient.items():
        torch.testing.assert_close(mine, its_gradient[name], rtol=1e-9, atol=1e-12)
    without, _, _ = case.run()
    assert abs(total - without) > 1e-3
