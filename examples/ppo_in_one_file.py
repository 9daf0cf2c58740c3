"""PPO for a language model, top to bottom in one file, on the formulas of `src.core` alone.

    python -m examples.ppo_in_one_file

A GPT-2 of two layers first learns to write small film reviews, good and bad ones alike. Then PPO teaches it to write
good ones: a function scores each review, and the KL to the model as it was keeps the reviews reviews. Read
`make_experience` (what PPO learns from) and `learn_epoch` (how it learns) first.

`src.rollout` and `src.modules` do the same, with a key-value cache, micro-batches, LoRA adapters that share one base
model, other losses and checkpoints. `tests/examples/test_ppo_in_one_file.py` holds the first iteration of both equal.
"""

from __future__ import annotations

import copy
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from src.core.advantages import gae, lambda_returns
from src.core.aggregation import token_mean, weighted_sum
from src.core.kl import k1
from src.core.logprobs import logprobs_from_logits
from src.core.masking import masked, masked_mean, position_ids, whiten
from src.core.padding import pad_left
from src.core.policy_losses import clipped_surrogate
from src.core.rewards import set_missing_eos, token_rewards
from src.core.value_losses import clipped_squared_error


@dataclass(frozen=True)
class Settings:
    """What may be tuned; the names are those of the configuration."""

    sft_steps: int = 200  # of supervised fine-tuning, before PPO
    num_iterations: int = 20
    batch_size: int = 64  # responses per iteration
    epochs: int = 4  # passes over the responses of one iteration
    minibatch_size: int = 32  # responses per optimizer step
    lr: float = 3e-4  # of policy and critic
    max_grad_norm: float = 1.0
    max_new_tokens: int = 12
    temperature: float = 1.0  # of sampling and of every log-probability alike
    kl_coef: float = 0.05  # price of one nat of KL(policy || reference), in units of the score
    missing_eos_score: float = -1.0  # the score of a review without an end
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # of GAE: 1 trusts the rewards alone, 0 the critic alone
    clip: float = 0.2  # how far the ratio of new to old probability may move and still be rewarded for it
    value_clip: float = 0.2  # the same for the critic, in units of the return


# A small language: `the film was bright and the end was dull`.
GOOD, BAD = ["good", "great", "bright"], ["bad", "dull", "long"]
NOUNS = ["film", "plot", "cast", "end"]
WORDS = ["<pad>", "<eos>", "the", "was", "and", "but", *NOUNS, *GOOD, *BAD]
PAD, EOS = 0, 1


def tokens(text: str) -> list[int]:
    """The ids of the words of a text."""
    return [WORDS.index(word) for word in text.split()]


def text_of(ids: Tensor) -> str:
    """The words of a row of ids."""
    return " ".join(WORDS[i] for i in ids.tolist() if i not in (PAD, EOS))


def review(generator: torch.Generator) -> str:
    """One to three claims, each good or bad at random."""

    def pick(choices: list[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return " and ".join(f"the {pick(NOUNS)} was {pick(GOOD + BAD)}" for _ in range(pick([1, 2, 3])))


def score(texts: list[str]) -> Tensor:
    """The reward, from -1 to 1: good words less bad words, over their number. A reward model would stand here."""
    signs = [[(word in GOOD) - (word in BAD) for word in text.split() if word in GOOD + BAD] for text in texts]
    return torch.tensor([sum(row) / max(len(row), 1) for row in signs])


class Critic(nn.Module):
    """V(s): a GPT-2 body with one number at each position, in place of a score for each word."""

    def __init__(self, body: GPT2Model) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(body.config.n_embd, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The value after each token, (B, S)."""
        hidden = self.body(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).last_hidden_state
        return self.head(hidden).squeeze(-1)


def new_model() -> GPT2LMHeadModel:
    """A GPT-2 that fits on a page; no dropout, because PPO compares probabilities."""
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=64, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def word_scores(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits after each token, (B, S, V). Padding is not seen, and positions count real tokens only."""
    return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits


def fine_tune(model: GPT2LMHeadModel, steps: int, generator: torch.Generator) -> None:
    """Supervised fine-tuning: the likelihood of example reviews goes up. It makes the model that PPO starts from."""
    optimizer = Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, mask = pad_left([[*tokens(review(generator)), EOS] for _ in range(64)], PAD)
        logprobs = logprobs_from_logits(word_scores(model, ids, mask)[:, :-1], ids[:, 1:])
        predicted = mask[:, 1:] & mask[:, :-1]  # the first token of a review has nothing to be predicted from
        optimizer.zero_grad()
        (-masked_mean(logprobs, predicted)).backward()
        optimizer.step()


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one iteration learns from. B responses of at most T tokens; all (B, T) are 0 outside the mask."""

    ids: Tensor  # (B, P + T), prompts and responses; prompts are padded on the left, responses on the right
    is_token: Tensor  # (B, P + T), False at padding
    mask: Tensor  # (B, T), the same for the responses: True up to and including the end token
    old_logprobs: Tensor  # (B, T), log pi_old(a_t | s_t)
    old_values: Tensor  # (B, T), V_old(s_t)
    advantages: Tensor  # (B, T), A_t
    returns: Tensor  # (B, T), what the critic should have predicted
    scores: Tensor  # (B,), of the reward
    kl: Tensor  # (B,), KL(policy || reference) of each response, in nats


@torch.no_grad()
def sample(
    policy: GPT2LMHeadModel, ids: Tensor, is_token: Tensor, s: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with responses, (B, P + T), which of these are tokens, and which responses ended by themselves, (B,).

    Each token is drawn from softmax(logits / temperature): the first word whose cumulative probability exceeds u.
    """
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(s.max_new_tokens):
        probabilities = (word_scores(policy, ids, is_token)[:, -1] / s.temperature).double().softmax(dim=-1)
        u = torch.rand(len(ids), dtype=torch.float64, generator=generator)  # uniform in [0, 1)
        token = (probabilities.cumsum(dim=-1) <= u.unsqueeze(1)).sum(dim=-1).clamp(max=len(WORDS) - 1)
        ids = torch.cat([ids, token.where(~ended, PAD).unsqueeze(1)], dim=1)
        is_token = torch.cat([is_token, ~ended.unsqueeze(1)], dim=1)
        ended = ended | (token == EOS)
        if ended.all():
            break
    return ids, is_token, ended


def action_logprobs(model: GPT2LMHeadModel, ids: Tensor, is_token: Tensor, actions: int, temperature: float) -> Tensor:
    """log pi(a_t | s_t) of the last `actions` tokens, (B, T); the logits of a token are those one position before."""
    logits = word_scores(model, ids, is_token)[:, -actions - 1 : -1]
    return masked(logprobs_from_logits(logits, ids[:, -actions:], temperature), is_token[:, -actions:])


def action_values(critic: Critic, ids: Tensor, is_token: Tensor, actions: int) -> Tensor:
    """V(s_t) of the state before each of the last `actions` tokens, (B, T)."""
    return masked(critic(ids, is_token)[:, -actions - 1 : -1], is_token[:, -actions:])


@torch.no_grad()
def make_experience(
    policy: GPT2LMHeadModel, reference: GPT2LMHeadModel, critic: Critic, prompt_ids: Tensor, prompt_mask: Tensor,
    s: Settings, generator: torch.Generator,
) -> Experience:  # fmt: skip
    """One batch of responses with everything that PPO needs to know about them."""
    # 1. The policy answers the prompts. The reward scores prompt and answer together, as one text.
    ids, is_token, finished = sample(policy, prompt_ids, prompt_mask, s, generator)
    scores = score([text_of(row) for row in ids])
    actions = ids.shape[1] - prompt_ids.shape[1]
    mask = is_token[:, -actions:]

    # 2. Policy and reference say how probable each token was, the critic how much reward is still to come.
    old_logprobs = action_logprobs(policy, ids, is_token, actions, s.temperature)
    reference_logprobs = action_logprobs(reference, ids, is_token, actions, s.temperature)
    old_values = action_values(critic, ids, is_token, actions)

    # 3. One reward per token: what it costs to differ from the reference, and at the last token the score.
    kl = k1(old_logprobs, reference_logprobs)
    shaped = set_missing_eos(scores, finished, s.missing_eos_score)
    no_credit = torch.zeros_like(kl)  # a reward may also credit single tokens; here the score counts at the end only
    rewards = token_rewards(shaped, no_credit, kl, mask, s.kl_coef)

    # 4. Advantage: how much better a token turned out than the critic expected. Return: what it should have expected.
    advantages = gae(rewards, old_values, mask, s.gamma, s.lam)
    returns = lambda_returns(rewards, old_values, mask, s.gamma, s.lam)

    # 5. Whitening: over all tokens of the batch the advantages get mean 0 and variance 1, whatever the reward's scale.
    advantages = whiten(advantages, mask)
    return Experience(
        ids=ids, is_token=is_token, mask=mask, old_logprobs=old_logprobs, old_values=old_values, advantages=advantages,
        returns=returns, scores=scores, kl=kl.sum(dim=1),
    )  # fmt: skip


def step(optimizer: Adam, loss: Tensor, s: Settings) -> None:
    """One step of gradient descent, its gradient no longer than `max_grad_norm`."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], s.max_grad_norm)
    optimizer.step()


def learn_epoch(
    policy: GPT2LMHeadModel, critic: Critic, optimizers: list[Adam], experience: Experience, s: Settings,
    generator: torch.Generator,
) -> list[tuple[float, float]]:  # fmt: skip
    """One pass over the experience in random order; the losses of policy and critic in each minibatch."""
    losses = []
    for index in torch.randperm(len(experience.mask), generator=generator).split(s.minibatch_size):
        part = Experience(**{name: x[index] for name, x in vars(experience).items()})
        actions, weights = part.mask.shape[1], token_mean(part.mask)  # every token of the minibatch counts the same

        # The policy: tokens that turned out better than expected become more probable, others less. Once the ratio
        # pi / pi_old has left 1 +- clip in the direction that pays, its gradient is 0: going further gains nothing.
        # This takes the incentive away; it does not bound a step.
        logprobs = action_logprobs(policy, part.ids, part.is_token, actions, s.temperature)
        token_loss, _ = clipped_surrogate(logprobs, part.old_logprobs, part.advantages, part.mask, s.clip, s.clip)
        policy_loss = weighted_sum(token_loss, weights, part.mask)
        step(optimizers[0], policy_loss, s)

        # The critic: its values move toward the returns. Here too the gradient is 0 once a value has moved toward its
        # return by more than `value_clip`.
        values = action_values(critic, part.ids, part.is_token, actions)
        token_loss, _ = clipped_squared_error(values, part.old_values, part.returns, part.mask, s.value_clip)
        value_loss = weighted_sum(token_loss, weights, part.mask)
        step(optimizers[1], value_loss, s)
        losses.append((policy_loss.item(), value_loss.item()))
    return losses


def prompts(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`the film was`: the opening of so many reviews, ids and mask."""
    return pad_left([tokens(review(generator))[:3] for _ in range(rows)], PAD)


def main(s: Settings = Settings(), seed: int = 1) -> list[float]:
    """Fine-tune, then PPO; the mean score of each iteration."""
    torch.manual_seed(seed)  # of the fresh weights; everything else is drawn from:
    generator = torch.Generator().manual_seed(seed)
    policy = new_model()
    print(f"fine-tuning: {s.sft_steps} steps", flush=True)
    fine_tune(policy, s.sft_steps, generator)
    reference = copy.deepcopy(policy).requires_grad_(False)  # stays as it is
    critic = Critic(copy.deepcopy(policy.transformer))
    # policy and critic share no weight, so each has an optimizer
    optimizers = [Adam(model.parameters(), lr=s.lr, eps=1e-5) for model in (policy, critic)]
    print("PPO, by iteration: mean score (the reward), KL in nats per review, one review")
    scores: list[float] = []
    for iteration in range(s.num_iterations):
        experience = make_experience(policy, reference, critic, *prompts(s.batch_size, generator), s, generator)
        for _ in range(s.epochs):
            learn_epoch(policy, critic, optimizers, experience, s, generator)
        scores.append(experience.scores.mean().item())
        example = textwrap.shorten(text_of(experience.ids[0]), 50, placeholder=" ...")
        print(f"{iteration:3}  score {scores[-1]:5.2f}  KL {experience.kl.mean():5.2f}  {example}", flush=True)
    return scores


if __name__ == "__main__":
    torch.set_num_threads(1)  # faster for a model of this size
    main()
