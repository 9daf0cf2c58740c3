"""Each planted fault is found, under the name of the check that knows its cause; without the plant there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.doctor.diagnose import diagnose
from src.memory import checks as of_memory
from src.models.endings import Endings
from src.models.forward import hidden_states, whole_sequence
from src.models.loading import load_causal_lm
from src.models.roles import FullRoles, LoraRoles, Role, Roles, build_roles
from src.models.scalar_head import output_layer
from src.models.weights import restore, snapshot
from src.rewards.learned import LearnedReward
from src.rollout.answering import Responses
from src.rollout.engines.local import LocalEngine
from src.rollout.sampling import Sampler
from src.types import PreferencePair, PromptRow, Rollout
from tests.chats import GEMMA, chat_tokenizer, write_chat_lm
from tests.conftest import TINY_RUN
from tests.doctor.patients import faults, found_in
from tests.tiny import (
    EOS,
    FOREIGN_WARNINGS,
    LORA,
    TEXTS,
    ScriptedReward,
    TinyCorpus,
    make_maker,
    model_settings,
    tokenizer,
    write_lm,
    write_reward_model,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("classifier"))


def roles_of(path: str, lora: Any = LORA) -> Roles:
    return build_roles(model_settings(path, lora), tokenizer(), seed=5)


def whole(kind: type[FullRoles], path: str) -> FullRoles:
    """Roles of a user's own class."""
    return kind(load_causal_lm(model_settings(path, None)), tokenizer(), False, True)


def test_without_a_plant_there_is_no_fault(base: str) -> None:
    for lora in (LORA, None):
        assert faults(found_in(roles_of(base, lora), maker=make_maker(sampler=Sampler(24)))) == {}


# ------------------------------------------------------------------------------------------- tokens, masks and passes


def test_wrong_pad_id(base: str) -> None:
    roles = roles_of(base)
    roles.tokenizer.pad_token = " film"
    assert "in 1 of 8 prompts" in faults(found_in(roles))["padding token"]


class MasksById(FullRoles):
    """Leaves out what has the padding token's id, not what the mask says."""

    def _states(self, lm: Any, rollout: Rollout, role: Role) -> Tensor:
        ids, _ = whole_sequence(rollout)
        return hidden_states(lm, ids, ids != self.tokenizer.pad_token_id)


def test_masks_made_from_the_pad_id(base: str) -> None:
    """As long as padding holds its own id nothing shows; the doctor puts other ids there."""
    assert "padding" in faults(found_in(whole(MasksById, base)))


class Shifted(FullRoles):
    """Reads the log-probabilities under a mask that is one token too far on the right."""

    def distribution(self, rollout: Rollout, temperature: float, role: Role = "policy") -> Any:
        mask = rollout.response_mask.roll(1, 1)
        return super().distribution(replace(rollout, response_mask=mask), temperature, role)


class WithoutEnd(LocalEngine):
    """Leaves the end token out of the mask."""

    def sample(self, *given: Any) -> Responses:
        ids, mask, logprobs, finished = super().sample(*given)
        return ids, mask & (ids != EOS), logprobs, finished


def test_shifted_mask(base: str) -> None:
    long = Sampler(24)  # so that responses end in different places
    assert "log-probabilities" in faults(found_in(whole(Shifted, base), maker=make_maker(sampler=long)))
    engine = make_maker(engine=WithoutEnd(), sampler=long)
    assert "response mask" in faults(found_in(roles_of(base), maker=engine))


class Dropping(FullRoles):
    """Lets the Trainer switch dropout on."""

    def train(self, mode: bool = True) -> Roles:
        return nn.Module.train(self, mode)


def test_dropout_on(tmp_path: Path) -> None:
    roles = whole(Dropping, write_lm(tmp_path, resid_pdrop=0.1))
    roles.eval()
    assert "dropout" in faults(found_in(roles))
    assert not roles.training  # as it was


def chat(path: str, template: str) -> Roles:
    made = chat_tokenizer(template)
    return build_roles(model_settings(path), made, seed=5)


class Chats(TinyCorpus):
    def prompts(self, split: str) -> list[PromptRow]:
        return [PromptRow(f"<|turn>user\n{text}<turn|>\n<|turn>model\n") for text in TEXTS]


def test_turn_end_missed(tmp_path: Path) -> None:
    """A turn that ends with a word, and roles that do not know the special token that ends it."""
    path, data = write_chat_lm(tmp_path), {"corpus": Chats(), "max_prompt_tokens": 30}
    assert "end tokens" not in faults(found_in(chat(path, GEMMA), data=data))
    roles = chat(path, GEMMA)
    roles.endings = Endings(frozenset({EOS}), EOS, None)
    assert "'<turn|>' should too" in faults(found_in(roles, data=data))["end tokens"]
    by_word = GEMMA.replace("<turn|>", "###")
    assert "ends one with '###" in faults(found_in(chat(path, by_word), data=data))["end tokens"]


# -------------------------------------------------------------------------------------- temperature, engine, reference


class Warmer(LocalEngine):
    """Samples at another temperature than it is asked to."""

    def sample(self, roles: Any, prompts: Any, sampler: Sampler, *given: Any) -> Responses:
        return super().sample(roles, prompts, replace(sampler, temperature=1.3), *given)


def test_temperature_mismatch(base: str) -> None:
    assert faults(found_in(roles_of(base), maker=make_maker(temperature=0.7)))["settings"].startswith("the temperature")
    assert "engine" in faults(found_in(roles_of(base), maker=make_maker(engine=Warmer())))


class Stale(LocalEngine):
    """Serves the weights of its first batch for ever."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def take(self, roles: Roles, policy_version: int) -> None:
        self.weights = self.weights or snapshot(roles.policy_parameters())

    def sample(self, roles: Roles, *given: Any) -> Responses:
        present = snapshot(roles.policy_parameters())
        restore(self.weights, roles.policy_parameters())
        try:
            return super().sample(roles, *given)
        finally:
            restore(present, roles.policy_parameters())


def test_stale_engine(base: str) -> None:
    """At the start it is right; it shows when the policy has moved, which the doctor moves and puts back."""
    roles = roles_of(base)
    before = snapshot(list(roles.parameters()))
    assert set(faults(found_in(roles, maker=make_maker(engine=Stale())))) == {"engine"}
    assert all(torch.equal(a, b) for a, b in zip(before, roles.parameters(), strict=True))


def test_reference_that_is_not_the_sft_model(base: str, tmp_path: Path) -> None:
    roles = roles_of(base, None)
    roles.models["reference"] = load_causal_lm(model_settings(write_lm(tmp_path, seed=1), None))
    assert set(faults(found_in(roles))) == {"reference"}


# ----------------------------------------------------------------------------------------------- rewards and gradients


def test_nan_reward(base: str) -> None:
    def score(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        return [float("nan") if row == 3 else 0.5 * row for row in range(len(responses))]

    found = faults(found_in(roles_of(base), reward=score))
    assert set(found) == {"reward"}
    assert "gave nan for prompt" in found["reward"]


def test_constant_and_random_rewards_are_warnings(base: str) -> None:
    rising = iter(range(10**6))
    for score, name in (
        (lambda prompts, responses, metadata: [1.0] * len(responses), "scores"),
        (lambda prompts, responses, metadata: [float(next(rising)) for _ in responses], "scores twice"),
    ):
        found = found_in(roles_of(base), reward=score)
        assert faults(found) == {}
        assert name in {check.name for check in found if check.level == "warning"}


class Pairs(TinyCorpus):
    """Pairs of texts, of which the one that `better` scores higher is chosen."""

    def __init__(self, better: Callable[[list[str]], list[float]]) -> None:
        texts = [f" {a} {b}" for a in "great bad dull long bright film".split() for b in "plot end cast film .".split()]
        scored = sorted(zip(better(texts), texts, strict=True))
        self.rows = [
            PreferencePair(prompt="the film", chosen=high, rejected=low)
            for (_, low), (_, high) in zip(scored[:15], scored[15:], strict=True)
        ]

    def pairs(self, split: str) -> list[PreferencePair]:
        return self.rows


def test_untrained_reward_head(base: str, classifier: str) -> None:
    """Pairs that have nothing to do with its scores; and a folder without a head is refused when it is loaded."""
    corpus = Pairs(lambda texts: [float(hash_of(text)) for text in texts])
    found = faults(found_in(roles_of(base), reward=LearnedReward(classifier), data={"corpus": corpus}))
    assert set(found) == {"reward model"}
    assert "as a new one has" in found["reward model"]
    (check,) = [c for c in diagnose(tiny(base, "reward=learned", f"reward.path={base}")) if c.level == "fault"]
    assert "a reward model is a sequence classifier" in check.found


def hash_of(text: str) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(text, 1)) % 101


@pytest.mark.parametrize("swapped", [False, True])
def test_swapped_pairs(base: str, classifier: str, swapped: bool) -> None:
    """The pairs are made by the reward model's own scores, so its accuracy is 1, or 0 when they are swapped."""
    reward, sign = LearnedReward(classifier), -1 if swapped else 1
    reward.load()
    with torch.no_grad():
        output_layer(reward.model).weight *= 5  # no longer as new
    own = Pairs(lambda texts: (sign * reward.score(["the film"] * len(texts), texts, [])).tolist())
    found = faults(found_in(roles_of(base), reward=reward, data={"corpus": own}))
    assert set(found) == ({"reward model"} if swapped else set())
    assert not swapped or "prefers what was rejected" in found["reward model"]


class Detached(LoraRoles):
    """Cuts the critic off from its values."""

    def values(self, rollout: Rollout) -> Tensor:
        return super().values(rollout).detach()


class Freezing(LoraRoles):
    """Switches adapters as peft alone does, which freezes the one that is switched off."""

    def _switch(self, role: Role) -> None:
        super()._switch(role)
        for parameter in self.critic_parameters()[:-2]:  # all but the value head
            parameter.requires_grad_(False)


@pytest.mark.parametrize("kind", [Detached, Freezing])
def test_critic_without_gradient(base: str, kind: type[LoraRoles]) -> None:
    roles = kind(load_causal_lm(model_settings(base)), tokenizer(), LORA, False, True)
    assert set(faults(found_in(roles))) == {"gradient of the critic"}


def test_a_gradient_that_reaches_another_role(base: str) -> None:
    class Shared(FullRoles):
        def values(self, rollout: Rollout) -> Tensor:
            return super().values(rollout) + self.distribution(rollout, 1.0).logprobs()

    found = faults(found_in(whole(Shared, base)))
    assert "of others got one" in found["gradient of the critic"]


def test_a_part_that_raises_is_a_fault_with_its_place(base: str) -> None:
    class Typo(ScriptedReward):
        def score(self, *given: Any) -> list[float]:
            return [undefined]  # type: ignore[name-defined]  # noqa: F821

    found = faults(found_in(roles_of(base), reward=Typo()))
    assert set(found) == {"reward"}
    assert "undefined" in found["reward"]


# -------------------------------------------------------------------------- what a configuration is refused for at once


def tiny(base: str, *overrides: str) -> list[str]:
    return [*TINY_RUN, f"model.path={base}", "log_dir=absent", *overrides]


def test_targets_that_match_nothing(base: str) -> None:
    (check,) = diagnose(tiny(base, "model.lora.targets=[q_proj]"))
    assert check.level == "fault"
    assert "is called q_proj" in check.found


def test_prompt_too_long(base: str) -> None:
    """Prompts that lose their beginning, and a context that is too short for the settings."""
    found = faults(found_in(roles_of(base), data={"max_prompt_tokens": 1}))
    assert "8 of 16 prompts are longer than 1 tokens" in found["prompt length"]  # 8 to train, 8 to compare
    (check,) = diagnose(tiny(base, "rollout.max_prompt_tokens=48"))
    assert check.level == "fault"
    assert "reads at most 48" in check.found


def test_too_little_memory(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are loaded then."""
    monkeypatch.setattr(of_memory, "free_memory", lambda device: 2**16)
    *_, last = diagnose(tiny(base))
    assert (last.name, last.level) == ("memory", "fault")
    assert "0.1 MiB free" in last.found


def test_a_misspelled_key(base: str) -> None:
    (check,) = diagnose(tiny(base, "ppo.clipp=0.1"))
    assert (check.name, check.level) == ("configuration", "fault")
