"""Credit beyond one score per response: greedy baselines, a reward per token, and what the maker remembers."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass, fields, replace
from math import nan
from typing import Any

import pytest
import torch
from torch import Tensor

from src.core.estimators import GreedyBaseline, RewardToGo, RunningMeanBaseline
from src.errors import RewardError
from src.models.roles import Roles
from src.rollout.experience import ExperienceMaker
from src.rollout.kl_controller import AdaptiveKL, FixedKL
from src.rollout.scoring import Scorer
from src.rollout.shaping import Normalize, NoScaling, ScaleByStd, ScoreShaping, SetMissingEos
from src.types import Episodes, Experience, Prompts, Rollout
from tests.tiny import (
    EOS,
    FIRST_WORD,
    FOREIGN_WARNINGS,
    PAD,
    PROMPTS,
    ScriptedReward,
    assert_rows_close,
    make_maker,
    make_prompts,
    make_roles,
    plain_model,
    rows_of,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS

SHAPING = ScoreShaping(NoScaling(), 0.6, SetMissingEos(-2.0))


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    """No critic; this seed's greedy responses end by themselves for two of `WORDS` and go on for two."""
    return make_roles(write_lm(tmp_path_factory.mktemp("base"), seed=2), spread=0.1, critic=False)


def make(
    roles: Roles, maker: ExperienceMaker, reward: Any, *, seed: int = 2, prompts: Prompts | None = None
) -> tuple[Experience, dict[str, float]]:
    draws = torch.Generator().manual_seed(seed)
    return maker.make(roles, reward, prompts or make_prompts(PROMPTS), 4, draws)


def shaped(score: float, finished: bool) -> float:
    """Clipped, then the missing-EOS rule."""
    return max(-0.6, min(0.6, score)) if finished else -2.0


@dataclass(frozen=True)
class Keeping(GreedyBaseline):
    """The greedy baseline; keeps the episodes it was shown."""

    def advantages(self, episodes: Episodes) -> Tensor:
        self.__dict__["episodes"] = episodes
        return super().advantages(episodes)


GROUPS = [9, 4, 9, 7, 4, 9, 2]  # neither in order nor side by side
WORDS = {9: "the film", 4: "they", 7: "the plot was bright and", 2: "great"}


def grouped_prompts() -> Prompts:
    """Several samples of the same prompts, in an order that no sorting would give."""
    return replace(make_prompts([WORDS[group] for group in GROUPS]), group_ids=torch.tensor(GROUPS))


def greedy_by_transformers(roles: Roles, prompt: str) -> tuple[str, bool]:
    """The greedy response to a prompt by `generate`, without padding, and whether it ended by itself."""
    words = roles.tokenizer
    ids = torch.tensor([words(prompt)["input_ids"]])
    output = plain_model(roles, "policy").generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    response = output[0, ids.shape[1] :].tolist()
    return "".join(words.convert_ids_to_tokens([t for t in response if t >= FIRST_WORD])), response[-1] == EOS


def test_the_greedy_baseline_is_what_generate_would_have_scored(roles: Roles) -> None:
    """Checklist 16, 19, 20. One greedy response per prompt, shaped, the same for all samples of the prompt."""
    reward, estimator = ScriptedReward(), Keeping(1.0)
    maker = make_maker(shaping=SHAPING, advantage=estimator, whiten_advantages=False, kl_controller=FixedKL(0.7))
    experience, _ = make(roles, maker, reward, prompts=grouped_prompts())
    sampled, (prompts, responses, metadata) = reward.calls
    assert sampled[0] == [WORDS[group] for group in GROUPS]
    expected = {prompt: greedy_by_transformers(roles, prompt) for prompt in WORDS.values()}
    assert sorted(prompts) == sorted(WORDS.values())
    answers = {p: (r, m["finished"]) for p, r, m in zip(prompts, responses, metadata, strict=True)}
    assert answers == expected
    assert sorted(finished for _, finished in expected.values()) == [False, False, True, True]
    scores = {p: shaped(ScriptedReward().score([p], [r], [{}])[0], finished) for p, (r, finished) in expected.items()}
    baseline = [scores[WORDS[group]] for group in GROUPS]
    assert len(set(baseline)) > 1
    assert estimator.__dict__["episodes"].greedy_scores.tolist() == pytest.approx(baseline, abs=1e-6)
    rewards = rows_of(experience.rewards.double(), experience.mask)
    advantages = [[sum(row[t:]) - b for t in range(len(row))] for row, b in zip(rewards, baseline, strict=True)]
    assert_rows_close(rows_of(experience.advantages, experience.mask), advantages, 1e-5)


def test_greedy_scores_are_scaled_by_the_sampled_ones_and_leave_no_mark(roles: Roles) -> None:
    """Checklist 20, 21. They share the running moments of the sampled scores and are no part of them."""
    estimator, scaling, reward = Keeping(1.0), Normalize(), ScriptedReward()
    maker = make_maker(shaping=replace(SHAPING, scaling=scaling, score_clip=None), advantage=estimator)
    experience, _ = make(roles, maker, reward, prompts=grouped_prompts())
    assert scaling.moments.count == len(GROUPS)
    raw, (prompts, responses, metadata) = experience.scores.double(), reward.calls[1]
    greedy = dict(zip(prompts, ScriptedReward().score(prompts, responses, metadata), strict=True))
    ended = {p: m["finished"] for p, m in zip(prompts, metadata, strict=True)}
    expected = [(greedy[WORDS[g]] - raw.mean().item()) / raw.std().item() if ended[WORDS[g]] else -2.0 for g in GROUPS]
    assert estimator.__dict__["episodes"].greedy_scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_group_whose_greedy_response_fails_is_left_out_where_samples_may_be(roles: Roles) -> None:
    """It lacks a baseline; the other groups are as they would be without it."""
    whole = make_maker(advantage=GreedyBaseline(1.0), whiten_advantages=False)
    everything, _ = make(roles, whole, ScriptedReward(), prompts=grouped_prompts())

    class FailsOnGreedy(ScriptedReward):
        def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
            scores = super().score(prompts, responses, metadata)
            greedy = len(self.calls) > 1
            return [nan if greedy and p == WORDS[4] else s for p, s in zip(prompts, scores, strict=True)]

    maker = make_maker(advantage=GreedyBaseline(1.0), whiten_advantages=False, scorer=Scorer(None, drop_failed=True))
    experience, measures = make(roles, maker, FailsOnGreedy(), prompts=grouped_prompts())
    kept = [row for row, group in enumerate(GROUPS) if group != 4]
    assert experience.rollout.group_ids.tolist() == [GROUPS[row] for row in kept]
    assert measures["rollout/dropped"] == 2
    torch.testing.assert_close(experience.advantages, everything.advantages[kept])
    with pytest.raises(RewardError, match="gave nan for prompt 'they'"):
        make(roles, whole, FailsOnGreedy(), prompts=grouped_prompts())


def test_greedy_responses_draw_nothing(roles: Roles) -> None:
    """The samples are those of an estimator that asks for none, and the stream ends at the same place."""
    states, tokens = [], []
    for advantage in (GreedyBaseline(1.0), RewardToGo(1.0)):
        draws = torch.Generator().manual_seed(5)
        experience, _ = make_maker(advantage=advantage).make(roles, ScriptedReward(), grouped_prompts(), 4, draws)
        states.append(draws.get_state())
        tokens.append(experience.rollout.response_ids)
    assert torch.equal(*states)
    assert torch.equal(*tokens)


class Dense:
    """Random credit for every token; NaN where no token counts."""

    def __init__(self) -> None:
        self.credit = torch.empty(0)

    def score_tokens(self, rollout: Rollout) -> Tensor:
        draws = torch.Generator().manual_seed(1)
        self.credit = torch.randn(rollout.response_mask.shape, generator=draws)
        return self.credit.where(rollout.response_mask, float("nan"))


def test_a_reward_per_token_stays_with_its_token(roles: Roles) -> None:
    """Checklist 13, 16, 18, 19, 20. The clip shrinks all credits alike; the last token gets the rest; the KL."""
    reward = Dense()
    maker = make_maker(
        shaping=SHAPING, kl_controller=FixedKL(0.7), advantage=RewardToGo(0.9), whiten_advantages=False
    )  # fmt: skip
    experience, measures = make(roles, maker, reward)
    mask, finished = experience.mask, experience.rollout.finished.tolist()
    credit = rows_of(reward.credit.double(), mask)
    kls = rows_of(experience.old_logprobs.double() - experience.ref_logprobs, mask)
    shares = [shaped(sum(own), True) / sum(own) for own in credit]  # 1 where the clip does not bite
    assert min(shares) < 0.9
    kept = [[share * c for c in own] for share, own in zip(shares, credit, strict=True)]
    rewards = [[c - 0.7 * k for c, k in zip(*pair, strict=True)] for pair in zip(kept, kls, strict=True)]
    for row, own, ended in zip(rewards, kept, finished, strict=True):
        row[-1] += shaped(sum(own), ended) - sum(own)
    assert experience.scores.tolist() == pytest.approx([sum(row) for row in credit], abs=1e-5)
    assert_rows_close(rows_of(experience.rewards, mask), rewards, 1e-5)
    to_go = [[sum(0.9**l * r for l, r in enumerate(row[t:])) for t in range(len(row))] for row in rewards]  # noqa: E741
    assert_rows_close(rows_of(experience.advantages, mask), to_go, 1e-5)
    assert not experience.rewards[~mask].any()
    assert measures["rollout/score"] == pytest.approx(sum(map(sum, credit)) / 8, abs=1e-5)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("scaling", [ScaleByStd, Normalize])
def test_scale_and_clip_reach_every_credit(scaling: type[ScaleByStd], clip: float | None) -> None:
    """By hand; the parts of a score keep their shares, and the sum is the shaped score but for the shift."""
    scores, credit = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.5, 0.0], [1.0, -1.0, 0.0]])
    shaping = ScoreShaping(scaling(), clip, SetMissingEos(-2.0))
    shaping.scaling.update(scores)
    std, mean = statistics.stdev(scores.tolist()), statistics.fmean(scores.tolist()) * (scaling is Normalize)
    for row, score in enumerate(scores.tolist()):
        scaled = (score - mean) / std
        limited = scaled if clip is None else max(-clip, min(clip, scaled))
        share = limited / scaled / std if scaled else 1 / std
        found = shaping.of_credit(scores, credit)[row].tolist()
        assert found == pytest.approx([share * part for part in credit[row].tolist()], abs=1e-6)
        if scaling is ScaleByStd:
            assert sum(found) == pytest.approx(limited, abs=1e-6)


def test_a_reward_per_token_without_shaping_is_itself(roles: Roles) -> None:
    """Checklist 16. Nothing is added where there is neither a rule nor a KL."""
    reward = Dense()
    experience, _ = make(roles, make_maker(kl_controller=FixedKL(0.0), advantage=RewardToGo(1.0)), reward)
    expected = reward.credit * experience.mask
    torch.testing.assert_close(experience.rewards, expected, atol=1e-6, rtol=0)


def remembering_maker() -> ExperienceMaker:
    """Everything that an iteration leaves behind for the next."""
    return make_maker(
        shaping=ScoreShaping(Normalize(), None, SetMissingEos(-2.0)), advantage=RunningMeanBaseline(0.9, 0.8),
        kl_controller=AdaptiveKL(0.5, kl_target=0.01, kl_horizon=100), whiten_advantages=False,
    )  # fmt: skip


def test_a_restored_maker_makes_the_same_next_experience(roles: Roles) -> None:
    """Checklist 32, 61. Bit for bit, after a round through a file; a fresh maker would not."""
    first = remembering_maker()
    for seed in (2, 3):
        make(roles, first, ScriptedReward(), seed=seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    restored, fresh = remembering_maker(), remembering_maker()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.state_dict() == first.state_dict() != fresh.state_dict()
    (expected, measures), again, other = (make(roles, m, ScriptedReward(), seed=4) for m in (first, restored, fresh))
    assert again[1] == measures
    assert restored.state_dict() == first.state_dict()
    for name in (f.name for f in fields(expected) if isinstance(getattr(expected, f.name), Tensor)):
        assert torch.equal(getattr(again[0], name), getattr(expected, name)), name
    assert torch.equal(again[0].rollout.response_ids, expected.rollout.response_ids)
    assert torch.equal(other[0].scores, expected.scores)
    assert other[1]["rollout/kl_coef"] != measures["rollout/kl_coef"]
    assert not torch.allclose(other[0].rewards, expected.rewards)
    assert not torch.allclose(other[0].advantages - expected.advantages, other[0].rewards - expected.rewards)


def test_credit_that_is_no_number_is_an_error_that_names_the_reward(roles: Roles) -> None:
    """Checklist 13. As it is for a score; whitened, such advantages are 0 and nothing else would tell."""

    class Broken(Dense):
        def score_tokens(self, rollout: Rollout) -> Tensor:
            return super().score_tokens(rollout) / 0 * 0

    with pytest.raises(RewardError, match="reward Broken gave nan"):
        make(roles, make_maker(advantage=RewardToGo(1.0)), Broken())
