"""What can be wrong with the numbers of the first iteration: masks, log-probabilities, scores, advantages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.core.masking import masked_variance, until_first_stop
from src.models.roles import Role, Roles
from src.models.weights import moved_by, restore, snapshot
from src.rollout.answering import answered
from src.rollout.experience import ExperienceMaker
from src.rollout.minibatches import join, micro_batches
from src.rollout.sampler_check import Agreement, agreement
from src.rollout.scoring import Scorer
from src.types import AnyReward, Experience, Prompts, Rollout
from src.utils.check import Check, checked

MOVED = 5.0  # times what rounding explains: how far a policy is moved to see whether the engine follows
SHOWN = 12  # tokens of a prompt and of a response
LARGE = 10.0  # a return beyond this is large for a critic that starts at 0

PerToken = Callable[[Rollout], Tensor]  # a rollout -> (B, T)


@torch.no_grad()
def drawn(maker: ExperienceMaker, roles: Roles, prompts: Prompts, draws: torch.Generator) -> Rollout:
    """Responses of the engine, not yet compared with the path that trains, so that other checks can say what is off."""
    maker.engine.take(roles, 0)
    return answered(roles, prompts, partial(maker.engine.sample, roles, prompts, maker.sampler, draws), 0)


def response_mask(roles: Roles, rollout: Rollout) -> Check:
    """Whether the mask counts each response up to and including its first end token, and nothing after it."""
    stops = torch.tensor(sorted(roles.endings.ids), device=rollout.response_ids.device)
    mask, finished = until_first_stop(rollout.response_ids, stops)
    wrong = ((mask != rollout.response_mask).any(1) | (finished != rollout.finished)).sum().item()
    return checked(
        "response mask",
        f"{len(mask) - wrong} of {len(mask)} responses count up to and including their first end token",
        "the engine's response_mask and finished must be those of src.core.masking.until_first_stop",
        fault=wrong > 0,
    )


def padding(roles: Roles, rollout: Rollout, temperature: float) -> Check:
    """Log-probabilities (and values) of a row alone, against those among others with random tokens in the padding."""
    changed = _with_random_padding(roles, rollout)

    def difference(function: PerToken) -> Agreement:
        alone = join([(i, function(row)) for i, row in micro_batches(rollout, 1)], rollout.response_mask.shape)
        together = function(changed)[:, : alone.shape[1]]
        return agreement(roles, rollout.response_mask, alone, together, temperature)

    functions = [_logprobs_of(roles, temperature, role) for role in ("policy", "reference")]
    with torch.no_grad():
        found = [difference(function) for function in functions]
        found += [difference(roles.values)] if roles.value_head is not None else []
    worst = max(found, key=lambda each: each.found if each.found == each.found else torch.inf)
    return checked(
        "padding",
        f"a row alone and padded among others differ by {worst}",
        "positions and attention must come from the masks, never from the padding token's id",
        fault=not worst.holds,
    )


def plain_logprobs(roles: Roles, rollout: Rollout, temperature: float) -> Check:
    """The policy's log-probabilities against whole forwards by transformers alone, and zeros outside the mask."""
    mask = rollout.response_mask
    with torch.no_grad():
        own = _logprobs_of(roles, temperature)(rollout)
        plain = torch.zeros_like(own)
        for row, (p, pm, r, rm) in enumerate(
            zip(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, mask, strict=True)
        ):
            ids = torch.cat([p[pm], r[rm]])
            with roles.acting("policy") as lm:
                logits = lm(input_ids=ids.unsqueeze(0), attention_mask=torch.ones_like(ids).unsqueeze(0)).logits[0]
            before = logits[int(pm.sum()) - 1 : -1].float() / temperature  # of the token before each response token
            plain[row, : len(before)] = before.log_softmax(-1).gather(1, r[rm].unsqueeze(1)).squeeze(1).to(own)
    found, outside = agreement(roles, mask, own, plain, temperature), int((own[~mask] != 0).sum())
    extra = f"; {outside} numbers outside the mask are not 0" if outside else ""
    return checked(
        "log-probabilities",
        f"against transformers alone: {found}{extra}",
        "the log-probability of response token t is read from the logits at t - 1, and is 0 where the mask is False",
        fault=not found.holds or outside > 0,
    )


def no_dropout(roles: Roles, rollout: Rollout, temperature: float) -> Check:
    """Two passes as in training give the same log-probabilities. `roles` must be as the Trainer leaves them."""
    first, second = (_logprobs_of(roles, temperature)(rollout).detach() for _ in range(2))
    on = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in roles.modules())
    found = agreement(roles, rollout.response_mask, first, second, temperature)
    return checked(
        "dropout",
        f"two passes differ by {found}; {on} dropout layers are on",
        "roles must stay in eval mode (Roles.train), or dropout changes every ratio",
        fault=not found.holds or on > 0,
    )


def engine_follows(
    maker: ExperienceMaker, roles: Roles, prompts: Prompts, rollout: Rollout, draws: torch.Generator
) -> Check:
    """Whether the engine draws from the policy after its weights have moved; they are put back.

    `maker` compares every batch with the path that trains. Raises `ModelError` when they differ.
    """
    temperature, parameters, size = maker.sampler.temperature, roles.policy_parameters(), 0.001
    logprobs, noise = _logprobs_of(roles, temperature), torch.Generator().manual_seed(0)
    with torch.no_grad():
        before, start = snapshot(parameters), logprobs(rollout)
        maker.draw(roles, prompts, 0, draws)
        try:
            while True:
                moved_by(parameters, size, noise)
                by, size = agreement(roles, rollout.response_mask, logprobs(rollout), start, temperature), 2 * size
                if not by.found < MOVED * by.limit or size > 100:
                    break
            maker.draw(roles, prompts, 1, draws)
        finally:
            restore(before, parameters)
    return checked(
        "engine",
        f"draws from the policy that trains, also after that has moved by {by.found:.2g} nats {by.by}",
        "the policy's log-probabilities hardly depend on roles.policy_parameters()",
        fault=not by.found > 0,
        warning=by.found < MOVED * by.limit,
    )


def scores(scorer: Scorer, reward: AnyReward, rollout: Rollout, groups: bool, learns: bool) -> Iterator[Check]:
    """Whether scores differ between responses (for an estimator of `groups`: to one prompt), and are the same twice.

    `learns`: the reward is a model, whose scores cannot all be the same. Raises `RewardError` for a score that is not
    finite.
    """
    started = time.perf_counter()
    first, second = scorer.score(reward, rollout), scorer.score(reward, rollout)
    seconds, given, rows = (time.perf_counter() - started) / 2, first.scores.double(), len(rollout.prompts)
    spread = given.std(correction=0).item()
    found = f"{given.mean():.3g} +- {spread:.3g} on {len(given)} responses, {seconds:.2g} s a call"
    dropped = f"; {first.dropped} of {rows} could not be scored" if first.dropped else ""
    yield checked(
        "scores",
        found + dropped,
        "if all responses score the same there is nothing to learn: look at the samples, the reward, the columns",
        fault=learns and spread == 0,
        warning=spread == 0 or first.dropped > 0,
    )
    same = first.scores.shape == second.scores.shape and torch.equal(first.scores, second.scores)
    mend = "a random reward adds noise to every gradient; if it is meant (a sampled reward model), leave it"
    yield checked("scores twice", "the same" if same else "differ", mend, warning=not same)
    if groups:
        kept = first.rollout.group_ids
        flat = sum(bool((given[kept == group] == given[kept == group][0]).all()) for group in kept.unique())
        total = len(kept.unique())
        yield checked(
            "groups",
            f"in {flat} of {total} groups all responses score the same, which gives them no gradient",
            "other prompts, more rollout.samples_per_prompt, a reward that tells responses apart",
            warning=flat == total,
        )


def first_iteration(roles: Roles, experience: Experience, temperature: float, size: int) -> Iterator[Check]:
    """Ratio 1 in the first minibatch (by micro-batches of `size` rows), KL 0 to the reference, advantages, returns."""
    rollout, mask, logprobs = experience.rollout, experience.mask, _logprobs_of(roles, temperature)
    now = join([(index, logprobs(micro).detach()) for index, micro in micro_batches(rollout, size)], mask.shape)
    ratio = agreement(roles, mask, now, experience.old_logprobs, temperature)
    mean = (now - experience.old_logprobs)[mask].exp().mean()
    mend = "the experience must be made by the code, the weights and the temperature that train"
    yield checked("first ratio", f"mean {mean:.6g}; log-ratio {ratio}", mend, fault=not ratio.holds)
    with torch.no_grad():
        reference = _logprobs_of(roles, temperature, "reference")(rollout)
    apart = agreement(roles, mask, now, reference, temperature)
    yield checked(
        "reference",
        f"log(policy / reference) is {apart}: {_per_sequence(now - reference, mask):.3g} nats per sequence",
        "PPO starts from the reference: the reference must be the SFT model that the policy is made from",
        fault=not apart.holds,
    )
    yield _advantages(experience)
    if experience.returns is not None and experience.old_values is not None:
        size_of = experience.returns[mask].square().mean().sqrt().item()
        yield checked(
            "returns",
            f"root mean square {size_of:.3g}; values {experience.old_values[mask].mean():.3g} on average",
            "score_scaling=normalize or smaller scores: the critic starts at 0 and moves by ppo.critic_lr",
            warning=not size_of <= LARGE,
        )


def responses_end(rollout: Rollout, limit: int) -> Check:
    """The share of responses that end before the limit of tokens."""
    ended = int(rollout.finished.sum())
    return checked(
        "responses",
        f"{ended} of {len(rollout.finished)} end before {limit} tokens; "
        f"{rollout.response_mask.sum(1).float().mean():.1f} tokens on average",
        "if a trained model never ends: its end token, the turn's end, or a larger rollout.max_new_tokens",
        warning=ended == 0,
    )


def sample(roles: Roles, rollout: Rollout, row: int) -> Check:
    """A response with the end of its prompt, as the tokens that count and the number of those that do not."""
    ids, masks = (rollout.prompt_ids, rollout.response_ids), (rollout.prompt_mask, rollout.response_mask)
    name = roles.tokenizer.convert_ids_to_tokens
    prompt, response = (name(x[row][mask[row]].tolist()) for x, mask in zip(ids, masks, strict=True))
    left, right = (int((~mask[row]).sum()) for mask in masks)
    shown, more = "|".join(response[:SHOWN]), "|..." if len(response) > SHOWN else ""
    found = f"{'|'.join(prompt[-SHOWN:])} -> {shown}{more} ({len(prompt)} and {len(response)} tokens count, "
    return Check(f"sample {row + 1}", f"{found}{left} and {right} of padding do not)")


def _advantages(experience: Experience) -> Check:
    mask, given = experience.mask, experience.advantages
    outside, broken = int((given[~mask] != 0).sum()), int((~given.isfinite()).sum())
    same = given.shape == mask.shape
    spread = masked_variance(given, mask).sqrt().item() if same else float("nan")
    return checked(
        "advantages",
        f"standard deviation {spread:.3g}; {outside} outside the mask are not 0, {broken} are not finite",
        "an estimator gives (B, T) finite numbers, 0 outside the mask; without variance nothing is learned",
        fault=not same or outside > 0 or broken > 0,
        warning=spread == 0,
    )


def _logprobs_of(roles: Roles, temperature: float, role: Role = "policy") -> PerToken:
    return lambda rollout: roles.distribution(rollout, temperature, role).logprobs()


def _per_sequence(x: Tensor, mask: Tensor) -> float:
    return x.where(mask, 0).sum(1).mean().item()


def _with_random_padding(roles: Roles, rollout: Rollout) -> Rollout:
    """The rollout with three columns of padding more on each side, and random tokens in all padding."""
    words, draws = len(roles.tokenizer), torch.Generator().manual_seed(0)

    def widened(ids: Tensor, mask: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        ids, mask = F.pad(ids, sides), F.pad(mask, sides, value=False)
        return ids.where(mask, torch.randint(words, ids.shape, generator=draws).to(ids)), mask

    prompt_ids, prompt_mask = widened(rollout.prompt_ids, rollout.prompt_mask, (3, 0))
    response_ids, mask = widened(rollout.response_ids, rollout.response_mask, (0, 3))
    return replace(
        rollout, prompt_ids=prompt_ids, prompt_mask=prompt_mask, response_ids=response_ids, response_mask=mask,
        behavior_logprobs=F.pad(rollout.behavior_logprobs, (0, 3)), trunk=None,
    )  # fmt: skip
