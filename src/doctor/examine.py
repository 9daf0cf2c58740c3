"""Everything that PPO is made of, examined on a few responses: the rooms know what to measure, this collects it."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from lightning.pytorch import LightningDataModule

from src.callbacks.rollout import RolloutCallback, as_prompts, require_fitting
from src.data.checks import prompt_lengths
from src.data.modules import PromptData
from src.errors import DataError, UserError
from src.models.checks import end_tokens, padding_token, same_tokenizer
from src.models.weights import restore, snapshot
from src.modules.checks import backward, moved, role_gradients, roles_that_learn
from src.modules.ppo import PPOModule
from src.rewards.checks import learned, learned_parts, pairs_by
from src.rollout.checks import (
    drawn,
    engine_follows,
    first_iteration,
    no_dropout,
    padding,
    plain_logprobs,
    response_mask,
    responses_end,
    sample,
    scores,
)
from src.rollout.experience import ExperienceMaker
from src.types import Experience, PreferencePair, Prompts, Rollout, select
from src.utils.check import Check
from src.utils.exits import one_sentence
from src.utils.seeding import generator

ROWS = 32  # responses that are drawn, in whole groups
FEW = 6  # of them, for passes row by row
PAIRS = 128  # preference pairs that are scored

Result = TypeVar("Result")
Checks = Generator[Check, None, Result]


def examine(module: PPOModule, data: LightningDataModule, callback: RolloutCallback) -> list[Check]:
    """What is sound and what is not, before `trainer.fit(module, data)` with this callback.

    Draws and scores a few responses on the module's present device and runs a backward pass per role. Weights,
    gradients and the state of the experience maker are put back, and its engine is closed. Whatever a part raises is a
    fault.
    """
    return list(checks(module, data, callback))


def checks(
    module: PPOModule, data: LightningDataModule, callback: RolloutCallback, reward_is_trained: bool = True
) -> Iterator[Check]:
    """The same, one after the other; `reward_is_trained`: False for new weights in place of a reward model."""
    with _unchanged(module, callback.maker) as maker:
        yield from attempted("settings", _settings(maker, module, data))
        prompts = yield from attempted("prompts", _prompts(module, data))
        if prompts is None:
            return
        rollout = yield from attempted("sampling", _sampling(maker, module, prompts))
        if rollout is None:
            return
        yield from attempted("passes", _passes(module, _first(rollout, FEW)))
        yield from attempted("engine", _engine(maker, module, prompts, _first(rollout, FEW)))
        if (yield from attempted("reward", _reward(maker, module, rollout, reward_is_trained))):
            yield from attempted("first iteration", _iteration(maker, module, data, prompts))
        yield from attempted("reward model", _reward_model(module, data, reward_is_trained))


def attempted(name: str, work: Checks[Result]) -> Checks[Result | None]:
    """The checks that `work` gives, and what it returns; what it raises is a fault of that name, and gives None."""
    try:
        return (yield from work)
    except UserError as error:
        yield Check(name, one_sentence(error), "fault")
    except Exception as error:  # a user's part may raise anything
        at = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__} in {at.name} ({at.filename}:{at.lineno}): {one_sentence(error)}"
        yield Check(name, found, "fault", "mend this part: the run would end here")
    return None


@contextmanager
def _unchanged(module: PPOModule, maker: ExperienceMaker) -> Iterator[ExperienceMaker]:
    """A copy of the experience maker that compares each batch of the engine; everything is put back at the end."""
    own, state = copy.copy(maker), copy.deepcopy(maker.state_dict())
    own.check_every = 1
    trained = [*module.roles.policy_parameters(), *module.roles.critic_parameters()]
    before, modes = snapshot(trained), {part: part.training for part in module.modules()}
    try:
        yield own
    finally:
        with torch.no_grad():
            restore(before, trained)
        for part, training in modes.items():
            part.training = training
        module.zero_grad()
        maker.load_state_dict(state)
        maker.engine.close()


def _settings(maker: ExperienceMaker, module: PPOModule, data: LightningDataModule) -> Checks[None]:
    require_fitting(maker, module, data)
    yield Check("settings", "module, experience maker and data fit together")


def _prompts(module: PPOModule, data: LightningDataModule) -> Checks[Prompts]:
    """The first prompts of training, in whole groups, on the module's device."""
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batch = batch[0] if isinstance(batch, tuple) else batch  # of a CombinedLoader: the batch and its numbers
    prompts, roles = as_prompts(batch["prompts"]), module.roles
    rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
    yield padding_token(roles, rows)
    yield end_tokens(roles, prompts.texts)
    if isinstance(data, PromptData):
        yield same_tokenizer(roles, data.tokenizer)
        yield prompt_lengths(data)
    wanted = prompts.group_ids.unique()[: max(1, ROWS // max(1, getattr(data, "samples_per_prompt", 1)))]
    few = select(prompts, torch.isin(prompts.group_ids, wanted).nonzero().flatten())
    return _on(few, next(roles.parameters()).device)


def _sampling(maker: ExperienceMaker, module: PPOModule, prompts: Prompts) -> Checks[Rollout]:
    rollout = drawn(maker, module.roles, prompts, _draws(module, prompts))
    yield response_mask(module.roles, rollout)
    yield responses_end(rollout, maker.sampler.max_new_tokens)
    for row in range(min(2, len(prompts.texts))):
        yield sample(module.roles, rollout, row)
    return rollout


def _passes(module: PPOModule, rollout: Rollout) -> Checks[None]:
    roles, temperature = module.roles, module.settings.temperature
    module.train()  # as the Trainer does
    yield no_dropout(roles, rollout, temperature)
    yield plain_logprobs(roles, rollout, temperature)
    with moved(roles):
        yield padding(roles, rollout, temperature)


def _engine(maker: ExperienceMaker, module: PPOModule, prompts: Prompts, rollout: Rollout) -> Checks[None]:
    yield engine_follows(maker, module.roles, _first(prompts, FEW), rollout, _draws(module, prompts))


def _reward(maker: ExperienceMaker, module: PPOModule, rollout: Rollout, trained: bool) -> Checks[bool]:
    learns = trained and bool(learned_parts(module.reward))
    yield from scores(maker.scorer, module.reward, rollout, maker.advantage.needs_groups, learns)
    return True


def _iteration(maker: ExperienceMaker, module: PPOModule, data: LightningDataModule, prompts: Prompts) -> Checks[None]:
    started = time.perf_counter()
    experience, _ = maker.make(module.roles, module.reward, prompts, 0, _draws(module, prompts))
    rollout_seconds = time.perf_counter() - started
    yield from first_iteration(module.roles, experience, module.settings.temperature, module.fitting.size)
    yield _pace(module, data, experience, rollout_seconds)
    yield from role_gradients(module, _first(experience, FEW))


def _pace(module: PPOModule, data: LightningDataModule, experience: Experience, rollout_seconds: float) -> Check:
    """Seconds of an iteration and of all of them, in proportion to those of a few rows."""
    settings, micro = module.settings, _first(experience, module.settings.micro_batch_size)
    started = time.perf_counter()
    for role in roles_that_learn(module):
        backward(module, role, micro)
    module.zero_grad()
    update = (time.perf_counter() - started) / len(micro) * settings.epochs
    seconds = settings.batch_size * (rollout_seconds / len(experience) + update)
    found = f"about {seconds:.2g} s an iteration"
    iterations = getattr(data, "iterations", None)
    if iterations is not None:
        found += f", {iterations * seconds / 60:.2g} minutes for {iterations}"
    return Check("time", f"{found}; in proportion to {len(experience)} of {settings.batch_size} responses")


def _reward_model(module: PPOModule, data: LightningDataModule, trained: bool) -> Checks[None]:
    parts, gold = learned_parts(module.reward), module.gold_reward
    if parts and trained:
        pairs = _pairs(data, "test")
        yield from (learned(part, pairs) for part in parts)
    elif parts:
        mend = "train it (stage=reward), then examine again"
        yield Check("reward model", "not trained yet; examined with new weights in its place", "warning", mend)
        pairs = _pairs(data, "train")
        if pairs and hasattr(gold, "score") and not learned_parts(gold):
            yield pairs_by(gold, pairs)


def _pairs(data: LightningDataModule, split: str) -> list[PreferencePair]:
    """The first pairs of a split; none if the data has none."""
    read: Callable[[str], list[PreferencePair]] | None = getattr(getattr(data, "corpus", None), "pairs", None)
    try:
        return [] if read is None else list(islice(read(split), PAIRS))
    except DataError:
        return []


Rows = TypeVar("Rows", Prompts, Rollout, Experience)


def _first(record: Rows, count: int) -> Rows:
    """The first rows of a record."""
    rows = len(record) if isinstance(record, Experience) else len(record.group_ids)
    return select(record, torch.arange(min(count, rows)))


def _on(prompts: Prompts, device: torch.device) -> Prompts:
    ids, mask, index, group_ids = (x.to(device) for x in (prompts.ids, prompts.mask, prompts.index, prompts.group_ids))
    return replace(prompts, ids=ids, mask=mask, index=index, group_ids=group_ids)


def _draws(module: PPOModule, prompts: Prompts) -> torch.Generator:
    return generator(module.seed, "doctor", device=prompts.ids.device)
