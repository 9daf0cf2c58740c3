"""The one-file example is PPO as the project does it: one iteration of both gives the same numbers."""

from __future__ import annotations

import ast
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import examples.ppo_in_one_file as example
from src.core.estimators import GAE
from src.core.masking import masked_mean
from src.core.policy_losses import ClippedSurrogate
from src.core.value_losses import ClippedSquaredError
from src.data.tokenizers import word_level
from src.models.roles import FullRoles
from src.modules.ppo import PPOModule
from src.modules.settings import PPOSettings
from src.rollout.experience import ExperienceMaker
from src.rollout.kl_controller import FixedKL
from src.rollout.sampling import Sampler
from src.types import Experience, Prompts, Rollout
from src.utils.seeding import generator
from tests.tiny import FOREIGN_WARNINGS, Inject, fit

pytestmark = FOREIGN_WARNINGS

S = example.Settings(
    batch_size=24, epochs=2, minibatch_size=8, lr=3e-3, temperature=0.9, kl_coef=0.2, gamma=0.97, lam=0.9
)
SEED = 3
OPENINGS = ["the film", "the", "the plot was", "the end was good and the cast"]


class Score:
    """The example's reward, of the same ids."""

    def score_rollout(self, rollout: Rollout) -> Tensor:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids.where(rollout.response_mask, example.PAD)], dim=1)
        return example.score([example.text_of(row) for row in ids])


class Models:
    """Policy, reference and critic, all different from each other, twice: as the example has them, and as roles."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.reference = example.new_model().eval()
        example.fine_tune(self.reference, 20, torch.Generator().manual_seed(0))
        self.policy = copy.deepcopy(self.reference)
        self.critic = example.Critic(copy.deepcopy(self.reference.transformer)).eval()
        with torch.no_grad():
            for parameter in [*self.policy.parameters(), *self.critic.parameters()]:
                parameter += 0.02 * torch.randn(parameter.shape)
        tokenizer = word_level([" ".join(example.WORDS[2:])])
        self.roles = FullRoles(copy.deepcopy(self.reference), tokenizer, checkpointing=False, critic=True)
        self.roles.models["policy"].load_state_dict(self.policy.state_dict())
        self.roles.models["critic"].transformer.load_state_dict(self.critic.body.state_dict())
        assert self.roles.value_head is not None
        self.roles.value_head.load_state_dict(self.critic.head.state_dict())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each trained weight of the example with that of the roles."""
        critic = [*self.roles.models["critic"].transformer.parameters(), *self.roles.value_head.parameters()]
        theirs = [*self.roles.models["policy"].parameters(), *critic]
        mine = [*self.policy.parameters(), *self.critic.parameters()]
        return [(a.detach(), b.detach()) for a, b in zip(mine, theirs, strict=True)]


@pytest.fixture
def models() -> Models:
    return Models()


def prompts() -> tuple[Tensor, Tensor]:
    return example.pad_left([example.tokens(text) for text in OPENINGS * (S.batch_size // len(OPENINGS))], example.PAD)


def of_the_example(models: Models) -> example.Experience:
    draws = torch.Generator().manual_seed(SEED)
    return example.make_experience(models.policy, models.reference, models.critic, *prompts(), S, draws)


def of_the_project(models: Models) -> Experience:
    ids, mask = prompts()
    rows = torch.arange(len(ids))
    texts, metadata = tuple(map(example.text_of, ids)), tuple({} for _ in rows)
    batch = Prompts(ids=ids, mask=mask, index=rows, group_ids=rows, texts=texts, metadata=metadata)
    maker = ExperienceMaker(
        Sampler(S.max_new_tokens, S.temperature),
        kl_controller=FixedKL(S.kl_coef),
        advantage=GAE(gamma=S.gamma, lam=S.lam, critic_lam=S.lam),
    )
    return maker.make(models.roles, Score(), batch, 0, torch.Generator().manual_seed(SEED))[0]


def test_the_first_experience_is_the_same(models: Models) -> None:
    """Drawn with the same numbers: the same tokens; and from there on all that PPO makes of them."""
    mine, theirs = of_the_example(models), of_the_project(models)
    responses = mine.ids[:, -mine.mask.shape[1] :]
    assert torch.equal(responses.where(mine.mask, 0), theirs.rollout.response_ids.where(theirs.mask, 0))
    assert torch.equal(mine.mask, theirs.mask)
    assert len(set(mine.mask.sum(1).tolist())) > 3  # ragged
    assert 0 < theirs.rollout.finished.sum() < S.batch_size  # some end, some are cut off
    assert_close(mine.scores, theirs.scores)
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-5, rtol=1e-4)
    assert theirs.ref_logprobs is not None
    assert_close(mine.kl, (theirs.old_logprobs - theirs.ref_logprobs).sum(1), atol=1e-5, rtol=1e-4)
    assert mine.kl.abs().max() > 0.1


class PolicySpy(ClippedSurrogate):
    """Notes the loss of each minibatch, and how much was clipped."""

    seen: list[tuple[float, float]]

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        loss, seen = super().__call__(logprobs, old_logprobs, advantages, mask)
        self.seen.append((masked_mean(loss.detach(), mask).item(), masked_mean(seen["clip_fraction"], mask).item()))
        return loss, seen


class ValueSpy(ClippedSquaredError):  # noqa: N818 - an error squared, no exception
    """Notes the loss of each minibatch."""

    seen: list[float]

    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss, clipped = super().__call__(values, old_values, returns, mask)
        self.seen.append(masked_mean(loss.detach(), mask).item())
        return loss, clipped


def test_the_first_iteration_learns_the_same(models: Models, tmp_path: Path) -> None:
    """Two epochs of three minibatches: every loss, and every weight after the last step."""
    PolicySpy.seen, ValueSpy.seen = [], []
    before = [a.clone() for a, _ in models.pairs()]
    assert all(torch.equal(a, b) for a, b in models.pairs())
    mine, theirs = of_the_example(models), of_the_project(models)

    optimizers = [torch.optim.Adam(model.parameters(), lr=S.lr, eps=1e-5) for model in (models.policy, models.critic)]
    losses = []
    for epoch in range(S.epochs):
        order = generator(SEED, "minibatches", 0, 0, epoch)
        losses += example.learn_epoch(models.policy, models.critic, optimizers, mine, S, order)

    module = PPOModule(
        models.roles,
        Score(),
        PPOSettings(batch_size=S.batch_size, epochs=S.epochs, minibatch_size=8, micro_batch_size=8, temperature=0.9),
        policy_loss=PolicySpy(S.clip, S.clip),
        value_loss=ValueSpy(S.value_clip),
        policy_optimizer=partial(torch.optim.Adam, lr=S.lr, eps=1e-5),
        seed=SEED,
    )
    fit(module, tmp_path, iterations=1, callbacks=(Inject(theirs),))

    assert len(losses) == len(PolicySpy.seen) == len(ValueSpy.seen) == 6
    assert [policy for policy, _ in losses] == pytest.approx([loss for loss, _ in PolicySpy.seen], abs=1e-5)
    assert [value for _, value in losses] == pytest.approx(ValueSpy.seen, abs=1e-5)
    assert max(clipped for _, clipped in PolicySpy.seen) > 0.05
    for a, b in models.pairs():
        assert_close(a, b, atol=2e-5, rtol=1e-3)
    moved = [(a - old).abs().max().item() for (a, _), old in zip(models.pairs(), before, strict=True)]
    assert min(moved) > 1e-3  # by far more than the tolerance


def test_the_score_rises(capsys: pytest.CaptureFixture[str]) -> None:
    scores = example.main(example.Settings(sft_steps=100, num_iterations=5))
    assert scores[-1] > scores[0] + 0.4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fine-tuning:", "PPO,", *"01234"]
    assert all(len(line) <= 80 for line in lines)


def test_it_needs_torch_transformers_and_the_formulas_alone() -> None:
    source = Path(example.__file__).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    ours = {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", "transformers"}}
    assert ours
    assert all(name.startswith("src.core.") for name in ours)
    assert len(source.splitlines()) <= 280
