"""A weighted sum of rewards, its parts visible one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from src.errors import RewardError, SettingError
from src.rewards.function import FunctionReward
from src.rewards.learned import LearnedReward
from src.rewards.mix import MixReward
from src.rewards.rules import LengthReward
from src.types import PartedReward
from tests.tiny import (
    FOREIGN_WARNINGS,
    ScriptedReward,
    fit,
    make_maker,
    make_module,
    make_roles,
    same_bits,
    snapshot,
    write_lm,
    write_reward_model,
)

pytestmark = FOREIGN_WARNINGS

TEXTS = (["a", "b", "c"], ["one", "one two", "one two three"], [{}, {}, {}])


class Fixed:
    """The same scores whatever is asked."""

    def __init__(self, *scores: float, as_tensor: bool = False) -> None:
        self.scores = torch.tensor(scores, dtype=torch.float64) if as_tensor else list(scores)

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        return self.scores


@pytest.mark.parametrize(
    "weights", [{"a": 1.0, "b": 0.2, "c": 3.0}, {"c": 0.5, "a": -2.0, "b": 1.0}, {"a": 0.0, "b": 0.0, "c": -1.0}]
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_weights_are_divided_by_the_sum_of_their_sizes(weights: dict[str, float], as_tensor: bool) -> None:
    """By name, in whatever order; a negative weight turns a part round."""
    parts = {"a": [1.0, 2.0, 3.0], "b": [0.5, -0.5, 0.0], "c": [10.0, 0.0, -10.0]}
    mix = MixReward({name: Fixed(*scores, as_tensor=as_tensor) for name, scores in parts.items()}, weights)
    size = sum(abs(weight) for weight in weights.values())
    expected = [sum(weights[name] * parts[name][row] for name in parts) / size for row in range(3)]
    assert mix.score(*TEXTS).tolist() == pytest.approx(expected, abs=1e-6)


def test_parts_are_what_each_reward_says_and_their_mix_is_the_score() -> None:
    mix = MixReward({"length": LengthReward(2), "scripted": ScriptedReward()}, {"length": 3.0, "scripted": 1.0})
    parts = mix.score_parts(*TEXTS)
    assert isinstance(mix, PartedReward)
    assert parts["length"].tolist() == pytest.approx([-0.5, 0.0, -0.5])
    assert parts["scripted"].tolist() == pytest.approx(ScriptedReward().score(*TEXTS))
    assert mix.combine(parts).tolist() == mix.score(*TEXTS).tolist()


def test_one_part_alone_is_that_reward_whatever_its_weight() -> None:
    for weight, sign in ((0.01, 1), (7.0, 1), (-7.0, -1)):
        scores = MixReward({"only": Fixed(1.0, -2.0, 0.5)}, {"only": weight}).score(*TEXTS)
        assert scores.tolist() == pytest.approx([sign * s for s in (1.0, -2.0, 0.5)])


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([], {}, "parts must be a mapping of at least one name"),
        (["a", "b"], {"a": 1.0}, "weights must be one number for each of a, b"),
        (["a"], {"a": 1.0, "b": 1.0}, "weights must be one number for each of a"),
        (["a", "b"], {"a": 1.0, "c": 1.0}, "weights must be one number for each of a, b"),
        (["a", "b"], {"a": 0.0, "b": 0.0}, "weights must be numbers of which one is not 0"),
    ],
)
def test_parts_and_weights_that_do_not_match_are_refused(parts: list[str], weights: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MixReward({name: Fixed(0.0) for name in parts}, weights)


class Says:
    """Answers with whatever it was given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Any:
        return self.answer


def test_no_part_sees_what_another_does_to_its_arguments() -> None:
    """A part that sorts, empties and edits what it is given leaves the others' scores, and the caller's rows, alone."""

    def spoils(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        responses.sort(key=len, reverse=True)
        for row in metadata:
            row["words"].clear()
        prompts.clear()
        return [0.0] * len(responses)

    def counts(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [
            len(r) + 10 * len(row["words"]) + 100 * (p == "p")
            for p, r, row in zip(prompts, responses, metadata, strict=True)
        ]

    parts = {"first": FunctionReward("spoils", spoils), "second": FunctionReward("counts", counts)}
    rows = [{"words": ["w"] * n} for n in (1, 2)]
    scores = MixReward(parts, {"first": 1.0, "second": 1.0}).score_parts(["p", "p"], ["a", "bcd"], rows)
    assert scores["second"].tolist() == [111.0, 123.0]
    assert rows == [{"words": ["w"]}, {"words": ["w", "w"]}]


def test_a_part_that_gives_no_numbers_is_named() -> None:
    for answer, error, message in (
        (None, RewardError, "reward Says returned None for 3 responses: one number for each is needed"),
        ([0.5], RewardError, "reward Says returned 1 number for 3 responses: one number for each is needed"),
        ([0.5, "good", 1], ValueError, "parts.words gave 'good', which is no number"),
    ):
        mix = MixReward({"length": LengthReward(2), "words": Says(answer)}, {"length": 1.0, "words": 1.0})
        with pytest.raises(error) as refused:
            mix.score(*TEXTS)
        assert str(refused.value) == message


# ----------------------------------------------------------------------------------------------------------- a real fit


class Watch(Callback):
    """Notes the mode of a module at each iteration."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.training = module, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.training += [part.training for part in self.module.modules() if part is not self.module]


def learned_mix(tmp_path: Path) -> MixReward:
    parts = {"learned": LearnedReward(write_reward_model(tmp_path / "reward"), 4), "length": LengthReward(4)}
    return MixReward(parts, {"learned": 1.0, "length": -0.5})


def test_a_reward_model_in_a_mix_moves_with_the_module_and_stays_frozen(tmp_path: Path) -> None:
    """Checklist 59. A submodule of the PPO module, so that `.to(device)` reaches it; in eval mode all along."""
    mix = learned_mix(tmp_path)
    learned = mix.parts["learned"]
    module = make_module(make_roles(write_lm(tmp_path / "lm")), reward=mix)
    assert any(part is learned for part in module.modules())
    module.train()
    weights, watch = snapshot(list(learned.parameters())), Watch(learned)
    fit(module, tmp_path, maker=make_maker(), callbacks=(watch,))
    assert same_bits(weights, list(learned.parameters()))
    assert not any(parameter.requires_grad for parameter in learned.parameters())
    assert len(watch.training) > 10
    assert not any(watch.training)
    assert not any(part.training for part in learned.modules())
    trained = {id(p) for o in module.trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert not trained & {id(parameter) for parameter in learned.parameters()}
    assert all(part.dtype == torch.float64 for part in module.double().reward.models.parameters())


class Rollouts(Callback):
    """Keeps the experience of each iteration."""

    def __init__(self) -> None:
        self.experience: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.experience.append(batch["experience"])


def test_every_part_is_logged_on_its_own_in_each_iteration(tmp_path: Path) -> None:
    """rollout/score_NAME is the part's mean before its weight; the score is the mix of them."""
    mix, seen = learned_mix(tmp_path), Rollouts()
    module = make_module(make_roles(write_lm(tmp_path / "lm")), reward=mix)
    recorder, _ = fit(module, tmp_path, maker=make_maker(), callbacks=(seen,))
    table = recorder.by_step()
    assert sorted(table) == [1, 2]
    for row, experience in zip(table.values(), seen.experience, strict=True):
        lengths = [-abs(len(text.split()) - 4) / 4 for text in experience.rollout.responses]
        texts = list(experience.rollout.prompts), list(experience.rollout.responses), [{}] * len(lengths)
        learned = mix.parts["learned"].score(*texts).tolist()
        assert row["rollout/score_length"] == pytest.approx(sum(lengths) / 8, abs=1e-6)
        assert row["rollout/score_learned"] == pytest.approx(sum(learned) / 8, abs=1e-5)
        mixed = [(1.0 * a - 0.5 * b) / 1.5 for a, b in zip(learned, lengths, strict=True)]
        assert experience.scores.tolist() == pytest.approx(mixed, abs=1e-5)
        assert row["rollout/score"] == pytest.approx(sum(mixed) / 8, abs=1e-5)


def test_a_plain_reward_logs_no_parts(tmp_path: Path) -> None:
    recorder, _ = fit(make_module(make_roles(write_lm(tmp_path))), tmp_path, maker=make_maker(), iterations=1)
    (row,) = recorder.by_step().values()
    assert "rollout/score" in row
    assert not [name for name in row if name.startswith("rollout/score_") and name != "rollout/score_std"]
