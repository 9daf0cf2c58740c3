"""PPO for a language model, top to bottom in one file, on the formulas of `src.core` alone.

    python -m examples.ppo_in_one_file

A GPT-2 of two layers first learns to write small film reviews, good and bad ones alike. Then PPO teaches it to write
good ones: a function scores each review, and the KL to the model as it was keeps the reviews reviews. It takes a
quarter of a minute. Read `make_experience` (what PPO learns from) and `learn_epoch` (how it learns) first.

`src.rollout` and `src.modules` do the same with more comfort: a key-value cache, micro-batches, adapters on one shared
base, many losses, checkpoints. `tests/examples/test_ppo_in_one_file.py` holds the first iteration of both equal.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from src.core.advantages import gae, lambda_returns
from src.core.aggregation import token_mean, weighted_sum
from src.core.kl import k1
from src.core.logprobs import logprobs_from_logits
from src.core.masking import masked, masked_mean, position_ids, until_first_stop, whiten
from src.core.padding import pad_left
from src.core.policy_losses import clipped_surrogate
from src.core.rewards import set_missing_eos, token_rewards
from src.core.value_losses import clipped_squared_error

# ------------------------------------------------------------------------------------------------------------- settings


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


# ----------------------------------------------------------------------------------------------------- a small language

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
    """`the film was bright and the end was dull`: one to three claims, each good or bad at random."""

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    claims = [
        f"the {pick(NOUNS)} was {pick(GOOD + BAD)}" for _ in range(int(torch.randint(1, 4, (), generator=generator)))
    ]
    return " and ".join(claims)


def score(texts: list[str]) -> Tensor:
    """The reward, from -1 to 1: good words less bad words, over their number. A reward model would stand here."""
    signs = [[(word in GOOD) - (word in BAD) for word in text.split() if word in GOOD + BAD] for text in texts]
    return torch.tensor([sum(row) / max(len(row), 1) for row in signs])


# --------------------------------------------------------------------------------------------------------------- models


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
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, mask = pad_left([[*tokens(review(generator)), EOS] for _ in range(64)], PAD)
        logprobs = logprobs_from_logits(word_scores(model, ids, mask)[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        (-masked_mean(logprobs, mask[:, 1:] & mask[:, :-1])).backward()
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------- experience


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one iteration learns from. B responses of at most T tokens; all (B, T) are 0 outside the mask."""

    prompt_ids: Tensor  # (B, P), padded on the left
    prompt_mask: Tensor  # (B, P)
    response_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), True up to and including the end token
    old_logprobs: Tensor  # (B, T), log pi_old(a_t | s_t)
    old_values: Tensor  # (B, T), V_old(s_t)
    advantages: Tensor  # (B, T), A_t
    returns: Tensor  # (B, T), what the critic should have said
    scores: Tensor  # (B,), of the reward
    kl: Tensor  # (B,), KL(policy || reference) of each response, in nats

    def rows(self, index: Tensor) -> Experience:
        """Some of the responses."""
        return Experience(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def whole(self) -> tuple[Tensor, Tensor]:
        """Prompts and responses side by side: ids and mask, (B, P + T)."""
        ids = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        return ids, torch.cat([self.prompt_mask, self.mask], dim=1)


@torch.no_grad()
def sample(
    policy: GPT2LMHeadModel, ids: Tensor, mask: Tensor, s: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Responses to prompts: ids (B, T), mask (B, T), and which of them ended by themselves (B,).

    Each token is drawn from softmax(logits / temperature): the first word whose cumulative probability exceeds u.
    """
    start, ended = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(s.max_new_tokens):
        probabilities = (word_scores(policy, ids, mask)[:, -1] / s.temperature).double().softmax(dim=-1)
        u = torch.rand(len(ids), dtype=torch.float64, generator=generator)
        token = (probabilities.cumsum(dim=-1) <= u.unsqueeze(1)).sum(dim=-1).clamp(max=len(WORDS) - 1)
        ids = torch.cat([ids, token.where(~ended, PAD).unsqueeze(1)], dim=1)
        mask = torch.cat([mask, ~ended.unsqueeze(1)], dim=1)
        ended = ended | (token == EOS)
        if ended.all():
            break
    response_mask, finished = until_first_stop(ids[:, start:], torch.tensor([EOS]))
    return ids[:, start:], response_mask, finished


def action_logprobs(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, actions: int, temperature: float) -> Tensor:
    """log pi(a_t | s_t) of the last `actions` tokens, (B, T); the logits of a token are those one position before."""
    logits = word_scores(model, ids, mask)[:, -actions - 1 : -1]
    return masked(logprobs_from_logits(logits, ids[:, -actions:], temperature), mask[:, -actions:])


def action_values(critic: Critic, ids: Tensor, mask: Tensor, actions: int) -> Tensor:
    """V(s_t) of the state before each of the last `actions` tokens, (B, T)."""
    return masked(critic(ids, mask)[:, -actions - 1 : -1], mask[:, -actions:])


@torch.no_grad()
def make_experience(
    policy: GPT2LMHeadModel, reference: GPT2LMHeadModel, critic: Critic, prompt_ids: Tensor, prompt_mask: Tensor,
    s: Settings, generator: torch.Generator,
) -> Experience:  # fmt: skip
    """One batch of responses with everything that PPO wants to know of them."""
    # 1. The policy answers the prompts, and the reward scores each whole answer.
    response_ids, mask, finished = sample(policy, prompt_ids, prompt_mask, s, generator)
    scores = score([text_of(row) for row in torch.cat([prompt_ids, response_ids.where(mask, PAD)], dim=1)])

    # 2. Policy and reference say how probable each token was, the critic how much reward is still to come.
    whole = torch.cat([prompt_ids, response_ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    actions = response_ids.shape[1]
    old_logprobs = action_logprobs(policy, *whole, actions, s.temperature)
    reference_logprobs = action_logprobs(reference, *whole, actions, s.temperature)
    old_values = action_values(critic, *whole, actions)

    # 3. One reward per token: what it costs to differ from the reference, and at the last token the score.
    kl = k1(old_logprobs, reference_logprobs)
    shaped = set_missing_eos(scores, finished, s.missing_eos_score)
    rewards = token_rewards(shaped, torch.zeros_like(kl), kl, mask, s.kl_coef)

    # 4. Advantage: how much better a token turned out than the critic expected. Return: what it should have expected.
    advantages = gae(rewards, old_values, mask, s.gamma, s.lam)
    returns = lambda_returns(rewards, old_values, mask, s.gamma, s.lam)
    return Experience(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask, response_ids=response_ids, mask=mask, old_logprobs=old_logprobs,
        old_values=old_values, advantages=whiten(advantages, mask), returns=returns, scores=scores, kl=kl.sum(dim=1),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- learning


def step(optimizer: torch.optim.Optimizer, loss: Tensor, s: Settings) -> None:
    """One step of gradient descent, its gradient no longer than `max_grad_norm`."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], s.max_grad_norm)
    optimizer.step()


def learn_epoch(
    policy: GPT2LMHeadModel, critic: Critic, optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    experience: Experience, s: Settings, generator: torch.Generator,
) -> list[tuple[float, float]]:  # fmt: skip
    """One pass over the experience in random order; the losses of policy and critic in each minibatch."""
    losses = []
    for index in torch.randperm(len(experience.mask), generator=generator).split(s.minibatch_size):
        part = experience.rows(index)
        ids, mask = part.whole()
        actions, weights = part.mask.shape[1], token_mean(part.mask)  # every token of the minibatch counts the same

        # The policy: tokens that turned out better than expected become more probable, others less. Once the ratio
        # pi / pi_old has left 1 +- clip in the direction that pays, its gradient is 0: no step goes too far.
        logprobs = action_logprobs(policy, ids, mask, actions, s.temperature)
        token_loss, _ = clipped_surrogate(logprobs, part.old_logprobs, part.advantages, part.mask, s.clip, s.clip)
        policy_loss = weighted_sum(token_loss, weights, part.mask)
        step(optimizers[0], policy_loss, s)

        # The critic: its values move toward the returns, at most `value_clip` at a time.
        values = action_values(critic, ids, mask, actions)
        token_loss, _ = clipped_squared_error(values, part.old_values, part.returns, part.mask, s.value_clip)
        value_loss = weighted_sum(token_loss, weights, part.mask)
        step(optimizers[1], value_loss, s)
        losses.append((policy_loss.item(), value_loss.item()))
    return losses


def adam(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Policy and critic share nothing, so each has an optimizer."""
    return torch.optim.Adam(model.parameters(), lr=s.lr, eps=1e-5)


def prompts(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`the film was`: the opening of so many reviews, ids and mask."""
    return pad_left([tokens(review(generator))[:3] for _ in range(rows)], PAD)


# ------------------------------------------------------------------------------------------------------------ all of it


def main(s: Settings = Settings(), seed: int = 1) -> list[float]:
    """Fine-tune, then PPO; the mean score of each iteration."""
    torch.manual_seed(seed)  # of the fresh weights; everything else is drawn from:
    generator = torch.Generator().manual_seed(seed)
    policy = new_model()
    fine_tune(policy, s.sft_steps, generator)
    reference = copy.deepcopy(policy).requires_grad_(False)  # stays as it is
    critic = Critic(copy.deepcopy(policy.transformer))
    optimizers = adam(policy, s), adam(critic, s)
    scores: list[float] = []
    for iteration in range(s.num_iterations):
        experience = make_experience(policy, reference, critic, *prompts(s.batch_size, generator), s, generator)
        for _ in range(s.epochs):
            learn_epoch(policy, critic, optimizers, experience, s, generator)
        scores.append(experience.scores.mean().item())
        sample_text = text_of(experience.whole()[0][0])
        print(f"{iteration:3}  score {scores[-1]:5.2f}  KL {experience.kl.mean():5.2f}  {sample_text}", flush=True)
    return scores


if __name__ == "__main__":
    torch.set_num_threads(1)  # faster for a model of this size
    main()
