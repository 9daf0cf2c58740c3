"""Answers to a file of prompts and their figures, by the formulas of a run's final comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isnan
from statistics import mean
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from torch import nn

from src.callbacks.rollout import as_prompts
from src.config.schema import PPORun
from src.core.padding import pad_left
from src.data.lengths import say_cut
from src.data.prompts import PromptWriter
from src.evaluate.prompt_file import PromptFile, given_responses
from src.models.chat_template import own_template
from src.models.endings import endings
from src.models.inference_roles import load_inference_roles
from src.models.loading import load_tokenizer
from src.models.roles import Role
from src.models.text import encode_prompts
from src.rewards.adapter import AdapterReward
from src.rollout.evaluation import AMOUNTS, Answers, Evaluation, Evaluator, joined, with_figure
from src.stages.ppo import PPOStage
from src.types import AnyReward, LoadedReward, Rollout
from src.utils.device import device
from src.utils.statistics import Figure, bootstrap_mean, share
from src.utils.text_metrics import distinct_ngrams, repetition


@dataclass(frozen=True)
class Evaluated:
    """Figures by group, and a row for every answer."""

    figures: dict[str, dict[str, Figure]]
    rows: list[dict[str, Any]]


def generate(config: PPORun, policy: str, reference: str | None, prompts: PromptFile) -> Evaluated:
    """The policy and, if there is one, the reference answer every prompt with the same random stream."""
    stage = PPOStage(config)
    stage.check()
    tokenizer = load_tokenizer(policy, trusted=stage.model.trust_remote_code)
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [row.prompt for row in prompts.rows])]
    say_cut("prompts", lengths, config.rollout.max_prompt_tokens, "beginning")
    roles = load_inference_roles(stage.model, tokenizer, policy, reference).to(device())
    rewards = load_rewards(stage)
    loader = stage.prompt_data(prompts, tokenizer, eval_prompts=len(prompts.rows)).test_dataloader()
    evaluator = Evaluator(stage.maker, prompts, config.seed)
    answers: dict[Role, list[Answers]] = {"reference": [], "policy": []} if reference else {"policy": []}
    with progress() as bar:
        task = bar.add_task("answering", total=len(prompts.rows))
        for number, batch in enumerate(loader):
            asked = as_prompts(
                {k: v.to(device()) if isinstance(v, torch.Tensor) else v for k, v in batch["prompts"].items()}
            )
            for role, parts in answers.items():
                parts.append(evaluator.answers(roles, role, rewards, asked, number, kl=reference is not None))
            bar.advance(task, len(asked.texts))
    whole = {role: with_repetition(joined(parts)) for role, parts in answers.items()}
    both = Evaluation(whole["reference"], whole["policy"]).paired() if reference is not None else None
    compared: dict[Role, Answers] = whole if both is None else {"reference": both.reference, "policy": both.policy}
    figures: dict[str, dict[str, Figure]] = {
        role: found.figures() | diversity(list(found.responses)) for role, found in compared.items()
    }
    if both is not None:
        figures |= {"improvement": both.improvement(), "win_rate": both.win_rate()}
    return Evaluated(figures, [row for role, found in whole.items() for row in rows_of(role, found)])


def score_given(config: PPORun, model: str, prompts: PromptFile) -> Evaluated | None:
    """Score the answers in the file's column `responses`; None when it has no such column.

    Several answers to one prompt are averaged first, so that intervals are over prompts.
    """
    responses = given_responses(prompts)
    if responses is None:
        return None
    stage = PPOStage(config)
    stage.check()
    rewards = load_rewards(stage)
    rollout = as_rollout(prompts, responses, model)
    measures = {
        "response_length": (rollout.response_mask.sum(1)).float().tolist(),
        "repetition": [repetition(text) for text in rollout.responses],
    }
    with progress() as bar:
        task = bar.add_task("scoring", total=len(rewards))
        for name, reward in rewards.items():
            measures[name] = stage.maker.scorer.scores(reward, rollout).tolist()
            bar.advance(task)
    found = Answers(rollout.prompts, rollout.responses, measures)
    figures = {
        name: over_prompts(name, values, rollout.prompt_index.tolist())
        for name, values in with_figure(measures).items()
    }
    return Evaluated({"given": figures | diversity(list(found.responses))}, rows_of("given", found))


def own_column(data: Any) -> str:
    """The column of the prompts in the data that the run was trained on; `prompt` if its prompts are not a column."""
    named = getattr(getattr(data, "columns", None), "prompt", None)
    return "prompt" if named is None else str(named)


def writer_of(data: Any, policy: str, chats: bool, saved_template: bool) -> PromptWriter | None:
    """Writes prompts as the data set `data` of a run does; None for a set that is no table of rows.

    `chats`: all its prompts were chats. `saved_template`: the chat template is the one in the policy's folder.
    """
    if not hasattr(data, "chat_template"):
        return None
    writer = PromptWriter(
        getattr(data, "template", None), data.chat or chats, data.system,
        None if saved_template else data.chat_template, data.tokenizer or policy,
        getattr(data, "chat_template_kwargs", None),  # questions of reasoning_gym have neither
    )  # fmt: skip
    if saved_template:
        writer.own_chat_template = own_template(load_tokenizer(policy)) or writer.own_chat_template
    return writer


def as_rollout(prompts: PromptFile, responses: list[list[str]], model: str) -> Rollout:
    """Given answers as a rollout, which rewards score; each counts as finished."""
    tokenizer = load_tokenizer(model)
    flat = [
        (i, row, text) for i, (row, texts) in enumerate(zip(prompts.rows, responses, strict=True)) for text in texts
    ]
    ends = endings(tokenizer)
    prompts_of = [row.prompt for _, row, _ in flat]
    prompt_ids, prompt_mask = pad_left(encode_prompts(tokenizer, prompts_of), tokenizer.pad_token_id)
    answers = encode_prompts(tokenizer, [text for _, _, text in flat], special=False)
    rows = [ends.closed(answer, prompt) for answer, prompt in zip(answers, prompts_of, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    index = torch.tensor([i for i, _, _ in flat])
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=ids,
        response_mask=mask,
        behavior_logprobs=torch.zeros(mask.shape),
        finished=torch.ones(len(flat), dtype=torch.bool),
        prompt_index=index,
        group_ids=index,
        prompts=tuple(prompts_of),
        responses=tuple(text for _, _, text in flat),
        metadata=tuple({k: v for k, v in row.metadata.items() if k != "responses"} for _, row, _ in flat),
        policy_version=0,
    )


def load_rewards(stage: PPOStage) -> dict[str, AnyReward]:
    """The reward as "score" and, where there is one, the gold reward as "gold"."""
    rewards: dict[str, Any] = {"score": stage.reward, "gold": stage.gold_reward}
    if isinstance(stage.reward, AdapterReward):  # a finished policy is merged, so there is no base to share
        rewards["score"] = stage.reward.standalone()
    for reward in rewards.values():
        if isinstance(reward, LoadedReward):
            reward.load(None)
        if isinstance(reward, nn.Module):
            reward.to(device())
    return {name: reward for name, reward in rewards.items() if reward is not None}


def with_repetition(answers: Answers) -> Answers:
    """Add the share of repeated 4-grams of each response."""
    return replace(answers, measures=answers.measures | {"repetition": [repetition(r) for r in answers.responses]})


def diversity(responses: list[str]) -> dict[str, Figure]:
    """distinct-1 and distinct-2 over all responses; no interval, as resampling repeats rows."""
    return {f"distinct_{n}": Figure(distinct_ngrams(responses, n), len(responses), None) for n in (1, 2)}


def over_prompts(name: str, values: list[float], index: list[int]) -> Figure:
    """The mean over prompts of the mean over each prompt's answers; answers without a score (NaN) are dropped.

    Its interval is that of `Answers.figures`: exact where every prompt has 0 or 1.
    """
    groups: dict[int, list[float]] = {}
    for i, value in zip(index, values, strict=True):
        if not isnan(value):
            groups.setdefault(i, []).append(value)
    return (bootstrap_mean if name in AMOUNTS else share)([mean(group) for group in groups.values()])


def rows_of(role: str, answers: Answers) -> list[dict[str, Any]]:
    """Prompt, response and measures of each answer; None where the reward failed."""
    return [
        {"role": role, "prompt": prompt, "response": response}
        | {name: None if isnan(values[i]) else values[i] for name, values in answers.measures.items()}
        for i, (prompt, response) in enumerate(zip(answers.prompts, answers.responses, strict=True))
    ]


class RateColumn(ProgressColumn):
    """Prompts per second."""

    def render(self, task: Task) -> str:
        """The rate; empty before the first prompt is done."""
        return f"{task.speed:.1f} per second" if task.speed else ""


def progress() -> Progress:
    """A bar with count, rate and time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn()
    )
