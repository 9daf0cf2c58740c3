"""When experience is made, and that looking at the policy never shifts its training."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tokenizers.processors import TemplateProcessing

from src.callbacks.rollout import RolloutCallback, as_prompts
from src.core.estimators import GroupRelative, LeaveOneOut, RewardToGo
from src.core.kl import SampledKL, k2
from src.data.modules import PromptData
from src.errors import ConfigError
from src.rollout.engines.local import LocalEngine
from src.rollout.evaluation import Evaluator, merge
from src.rollout.experience import ReferenceKL
from src.rollout.kl_controller import AdaptiveKL
from src.types import PromptRow
from tests.tiny import (
    FOREIGN_WARNINGS,
    PROMPTS,
    ScriptedReward,
    TinyCorpus,
    fit,
    make_maker,
    make_module,
    make_prompts,
    make_roles,
    plain_logprobs,
    plain_model,
    rows_of,
    tokenizer,
    write_lm,
)

pytestmark = FOREIGN_WARNINGS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lm(tmp_path_factory.mktemp("base"))


class Keep(Callback):
    """Keeps every experience, with the policy's plain logprobs of it before anything is learned."""

    def __init__(self, evaluate: bool) -> None:
        self.evaluate, self.seen = evaluate, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        experience = batch["experience"]
        self.seen.append((experience, plain_logprobs(plain_model(pl_module.roles, "policy"), experience.rollout)))
        if self.evaluate:
            Evaluator(make_maker(), TinyCorpus(), seed=3).evaluate(
                pl_module.roles, ScriptedReward(), None, make_prompts(PROMPTS), batch_idx
            )


def test_every_iteration_learns_from_what_the_current_policy_just_wrote(base: str, tmp_path: Path) -> None:
    """Checklist 5, 52, 58. No batch is made ahead: its logprobs are those of the policy at that moment."""
    keep = Keep(evaluate=False)
    fit(make_module(make_roles(base), iterations=3), tmp_path, maker=make_maker(), iterations=3, callbacks=(keep,))
    assert [experience.rollout.policy_version for experience, _ in keep.seen] == [0, 1, 2]
    for experience, expected in keep.seen:
        mask = experience.mask
        for tensor in (experience.rollout.behavior_logprobs, experience.old_logprobs):
            for mine, theirs in zip(rows_of(tensor, mask), expected, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5)
    texts = [experience.rollout.responses for experience, _ in keep.seen]
    assert len(set(texts)) == 3


def test_evaluating_between_iterations_shifts_nothing(base: str, tmp_path: Path) -> None:
    """Checklist 61. Streams are named: the same experience with and without an evaluation in between."""
    runs = []
    for evaluate in (False, True):
        keep = Keep(evaluate)
        fit(make_module(make_roles(base)), tmp_path, maker=make_maker(), callbacks=(keep,))
        runs.append(keep.seen)
    for (one, _), (two, _) in zip(*runs, strict=True):
        for name in ("old_logprobs", "advantages", "returns", "scores"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert one.rollout.responses == two.rollout.responses


def test_the_coefficient_travels_in_the_checkpoint_of_the_callback() -> None:
    """Checklist 32, 61."""
    one = RolloutCallback(make_maker(kl_controller=AdaptiveKL(0.5, 1.0, 100)), seed=1)
    two = RolloutCallback(make_maker(kl_controller=AdaptiveKL(0.5, 1.0, 100)), seed=1)
    one.maker.kl_controller.update(50.0, 8)
    two.load_state_dict(one.state_dict())
    assert two.maker.kl_controller.kl_coef == one.maker.kl_controller.kl_coef != 0.5


def test_collated_prompts_are_the_record_and_keep_their_end() -> None:
    """Checklist 2. Over-long prompts lose their beginning."""
    data = PromptData(
        TinyCorpus(), tokenizer(), batch_size=8, samples_per_prompt=1, iterations=1, eval_prompts=4,
        eval_batch_size=3, max_prompt_tokens=3,
        max_text_tokens=9, ptx_coef=0.0, seed=1,
    )  # fmt: skip
    rows = TinyCorpus().prompts("train")
    record, whole = as_prompts(data.collate(rows, list(range(8)))), make_prompts(PROMPTS)
    for row in range(8):
        assert record.ids[row][record.mask[row]].tolist() == whole.ids[row][whole.mask[row]].tolist()[-3:]
    assert record.texts == tuple(PROMPTS)
    assert record.metadata[2] == {"row": 2}
    assert record.index.tolist() == list(range(8))


def test_a_prompt_that_is_cut_keeps_its_opening_token_as_shorter_ones_do() -> None:
    """Of a tokenizer that begins every text with one, as Llama's do."""
    words, opening = tokenizer(), 7
    words.bos_token = words.convert_ids_to_tokens(opening)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", opening)])
    data = PromptData(
        TinyCorpus(), words, batch_size=8, samples_per_prompt=1, iterations=1, eval_prompts=4, eval_batch_size=3,
        max_prompt_tokens=3, max_text_tokens=9, ptx_coef=0.0, seed=1,
    )  # fmt: skip
    record = as_prompts(data.collate(TinyCorpus().prompts("train"), list(range(8))))
    plain = [tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    rows = [ids[mask].tolist() for ids, mask in zip(record.ids, record.mask, strict=True)]
    assert rows == [[opening, *row[-2:]] for row in plain]
    assert {len(row) for row in plain} > {1, 2, 4}  # shorter, as long and longer


@pytest.mark.parametrize("limit", [3, 5])
def test_prompts_that_are_cut_are_said_before_anything_is_drawn(base: str, limit: int) -> None:
    """How many of them, how long the longest is, and what avoids it; once, by the first rank."""
    lengths = [len(prompt.split()) for prompt in [*PROMPTS, *PROMPTS[:5]]]  # of training and of the comparison
    cut = sum(length > limit for length in lengths)
    data = PromptData(TinyCorpus(), tokenizer(), batch_size=8, max_prompt_tokens=limit, eval_prompts=5)
    module = make_module(make_roles(base))
    for rank in (0, 1):
        trainer: Any = SimpleNamespace(datamodule=data, is_global_zero=rank == 0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            RolloutCallback(make_maker()).on_fit_start(trainer, module)
        texts = [str(warning.message) for warning in said]
        assert len(texts) == (1 if cut and rank == 0 else 0)
        for text in texts:
            assert text.startswith(f"{cut} of 13 prompts are longer than {limit} tokens and lose their beginning; ")
            assert f"the longest has {max(lengths)}: a larger rollout.max_prompt_tokens" in text
    assert (cut > 0) == (limit == 3)


def test_a_prompt_without_a_token_is_refused() -> None:
    """Checklist 11, 12. There is no state to take the first action in."""
    data = PromptData(
        TinyCorpus(), tokenizer(), batch_size=2, samples_per_prompt=1, iterations=1, eval_prompts=4,
        eval_batch_size=3, max_prompt_tokens=3,
        max_text_tokens=9, ptx_coef=0.0, seed=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="prompt"):
        data.collate([PromptRow("the film"), PromptRow("")], [0, 1])


def test_an_evaluation_compares_policy_and_reference_on_the_same_draws(base: str) -> None:
    """Checklist 33. Before any step the two write the same; then they differ, and the KL is the sampled log-ratio."""
    evaluator, prompts = Evaluator(make_maker(), TinyCorpus(), seed=3), make_prompts(PROMPTS)
    fresh = evaluator.evaluate(make_roles(base), ScriptedReward(), None, prompts, 0)
    assert fresh.policy == fresh.reference
    assert fresh.policy.measures["kl"] == [0.0] * 8
    assert {name: f.value for name, f in fresh.improvement().items()} == {"score": 0.0}
    moved = evaluator.evaluate(make_roles(base, spread=0.2), ScriptedReward(), None, prompts, 0)
    assert moved.reference == fresh.reference
    assert moved.policy.responses != fresh.policy.responses
    assert any(abs(kl) > 0.05 for kl in moved.policy.measures["kl"])
    both = merge([fresh, moved])
    assert both.policy.measures["score"] == fresh.policy.measures["score"] + moved.policy.measures["score"]
    improvement = [a - b for a, b in zip(both.policy.measures["score"], both.reference.measures["score"], strict=True)]
    assert both.improvement()["score"].value == pytest.approx(sum(improvement) / 16)


LOSS_KL = ReferenceKL(in_reward=False, in_loss=True, estimator=SampledKL(k2))
DISAGREEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool, str]] = {
    # of the maker, of the module, whether the roles have a critic, and what is said
    "temperature": ({"temperature": 0.7}, {}, True, "0.7 in Sampler, 1.0 in PPOSettings"),
    "no values for the advantage": ({}, {"value_loss": None}, False, "GAE needs a critic: give critic=True"),
    "a critic without a loss": (
        {},
        {"value_loss": None},
        True,
        "GAE needs a critic: give critic=True and a value_loss",
    ),
    "a critic for nothing": ({"advantage": RewardToGo(1.0)}, {}, True, "RewardToGo does not use a critic"),
    "one sample where several are compared": (
        {"advantage": LeaveOneOut()},
        {"value_loss": None},
        False,
        r"LeaveOneOut compares samples of one prompt.*: give PromptData\(samples_per_prompt=4\), at least 2",
    ),
    "one sample in a group": (
        {"advantage": GroupRelative(True)},
        {"value_loss": None},
        False,
        "GroupRelative compares",
    ),
    "a KL in the loss of one": ({"reference_kl": LOSS_KL}, {"reference_kl": None}, True, "PPOModule.reference_kl"),
}


@pytest.mark.parametrize("which", DISAGREEMENTS)
def test_what_maker_and_module_disagree_about_is_refused_before_the_first_rollout(
    which: str, base: str, tmp_path: Path
) -> None:
    """From Python nothing else joins the two."""
    maker, module, critic, message = DISAGREEMENTS[which]
    roles, keep = make_roles(base, critic=critic), Keep(evaluate=False)
    with pytest.raises(ConfigError, match=message):
        fit(make_module(roles, **module), tmp_path, maker=make_maker(**maker), callbacks=(keep,))
    assert not keep.seen


class Closing(LocalEngine):
    """Counts how often it was closed."""

    def __init__(self) -> None:
        self.closed: list[bool] = []

    def close(self) -> None:
        self.closed.append(True)


class Failing(Callback):
    """An error in the middle of the training."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyError("planted")


def test_the_engine_is_closed_when_training_ends_in_whatever_way(base: str, tmp_path: Path) -> None:
    for callbacks in ((), (Failing(),)):
        engine = Closing()
        module, maker = make_module(make_roles(base), iterations=1), make_maker(engine=engine)
        with pytest.raises(KeyError, match="planted") if callbacks else nullcontext():
            fit(module, tmp_path, maker=maker, iterations=1, callbacks=callbacks)
        assert engine.closed
