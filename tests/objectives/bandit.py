"""A problem whose optimum is known, through the real ExperienceMaker and PPOModule, in float64.

Responses of one, two or three words. The policy is a table of logits, one row for each state, which is the text so far.
For max E[r] - beta KL(pi || ref) the optimum is pi*(y) = ref(y) exp(r(y) / beta) / Z; here pi* has rational shares, r
follows from it, and a batch holds each response exactly as often as pi* draws it. Every expectation is then a sum over
the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from src.core.estimators import LeaveOneOut
from src.models.distribution import TokenDistribution
from src.models.roles import Role, Roles
from src.modules.ppo import PPOModule
from src.modules.weighted_means import WeightedMeans
from src.rollout.experience import ExperienceMaker, ReferenceKL
from src.rollout.kl_controller import FixedKL
from src.rollout.shaping import IgnoreMissingEos, NoScaling, ScoreShaping
from src.types import Episodes, Experience, Rollout

WORDS, LONGEST, STOP = 3, 3, 0  # word 0 ends a response
BETA, CONSTANT = 0.3, 0.7  # the coefficient of the KL, and the optimum's value J* = beta log Z
Response = tuple[int, ...]
STATES = [(), *((a,) for a in range(1, WORDS)), *itertools.product(range(1, WORDS), repeat=2)]
SHARES = {  # pi*(word | state): fifths and quarters
    state: [Fraction(n, 4) for n in ((2, 1, 1), (1, 2, 1), (1, 1, 2))[i % 3]] for i, state in enumerate(STATES)
}


def responses() -> dict[Response, Fraction]:
    """Each response with its probability under pi*."""
    found: dict[Response, Fraction] = {}

    def grow(so_far: Response, share: Fraction) -> None:
        if len(so_far) == LONGEST or (so_far and so_far[-1] == STOP):
            found[so_far] = share
            return
        for word in range(WORDS):
            grow((*so_far, word), share * SHARES[so_far][word])

    grow((), Fraction(1))
    assert sum(found.values()) == 1
    return found


RESPONSES = responses()
ROWS = math.lcm(*(share.denominator for share in RESPONSES.values()))


def logits(seed: int) -> Tensor:
    """(states, words): those of pi* for seed 0, of a random policy for any other."""
    if seed == 0:
        return torch.tensor([[float(share) for share in SHARES[state]] for state in STATES]).double().log()
    return torch.randn(len(STATES), WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states_of(response_ids: Tensor) -> Tensor:
    """The number of the state before each word of responses (B, T); that of another state after a response's end."""
    places = WORDS ** torch.arange(LONGEST)
    numbers = torch.zeros(LONGEST, WORDS**LONGEST, dtype=torch.long)
    for number, state in enumerate(STATES):
        numbers[len(state), sum(word * WORDS**place for place, word in enumerate(state))] = number
    before = (response_ids * places).cumsum(1) - response_ids * places
    return numbers[torch.arange(LONGEST), before]


class Table(Roles):
    """Policy and reference as tables; the value of each state is given."""

    def __init__(self, policy: Tensor, reference: Tensor, values: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.value_head, self.score_head = None, None
        self.heads = nn.ModuleDict({"policy": self._head(policy), "reference": self._head(reference)})
        self.heads["reference"].requires_grad_(False)
        self.checkpointing, self.known = False, values

    @staticmethod
    def _head(table: Tensor) -> nn.Linear:
        head = nn.Linear(len(STATES), WORDS, bias=False, dtype=torch.float64)
        head.weight.data = table.t().clone()
        return head

    def distribution(self, rollout: Rollout, temperature: float, role: Role = "policy") -> TokenDistribution:
        """pi(. | s_t), from the state's row."""
        mask = rollout.response_mask
        hidden = torch.eye(len(STATES), dtype=torch.float64)[states_of(rollout.response_ids)[mask]]
        return TokenDistribution(hidden, self.heads[role], rollout.response_ids[mask], mask, temperature)

    def values(self, rollout: Rollout) -> Tensor:
        """V(s_t) as given."""
        assert self.known is not None
        return self.known[states_of(rollout.response_ids)] * rollout.response_mask

    @contextmanager
    def acting(self, role: Role) -> Iterator[Any]:
        """No role is a language model."""
        yield self.heads[role]

    def policy_parameters(self) -> list[nn.Parameter]:
        """The policy's table."""
        return list(self.heads["policy"].parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        """Values are given."""
        return []

    def save_adapter(self, folder: Any) -> bool:
        """There is none."""
        return False

    def merged_policy(self) -> Any:
        """There is none."""
        raise NotImplementedError


def log_ratio(policy: Tensor, reference: Tensor, response: Response) -> list[float]:
    """log pi(a_t | s_t) - log ref(a_t | s_t) of each word."""
    p, q = policy.log_softmax(-1), reference.log_softmax(-1)
    return [float((p - q)[STATES.index(response[:t]), word]) for t, word in enumerate(response)]


@dataclass(frozen=True)
class Score:
    """r(y) = beta log(pi*(y) / ref(y)) + J*."""

    reference: Tensor

    def score_rollout(self, rollout: Rollout) -> Tensor:
        """(B,)."""
        ratios = logits(0).log_softmax(-1) - self.reference.log_softmax(-1)
        found = ratios[states_of(rollout.response_ids), rollout.response_ids] * rollout.response_mask
        return BETA * found.sum(1) + CONSTANT


def optimal_values(reference: Tensor) -> Tensor:
    """V(s) = J* + beta log(pi*(s) / ref(s)): what is left of the reward once its part of the KL is subtracted."""
    return torch.tensor([CONSTANT + BETA * sum(log_ratio(logits(0), reference, s)) for s in STATES]).double()


def rollout(rows: Sequence[Response], group: int) -> Rollout:
    """A batch of these responses, `group` in a row for a prompt of their own."""
    samples = len(rows)
    lengths = torch.tensor([len(row) for row in rows])
    return Rollout(
        prompt_ids=torch.ones(samples, 1, dtype=torch.long), prompt_mask=torch.ones(samples, 1, dtype=torch.bool),
        response_ids=torch.tensor([[*row, *[STOP] * (LONGEST - len(row))] for row in rows]),
        response_mask=torch.arange(LONGEST) < lengths.unsqueeze(1),
        behavior_logprobs=torch.zeros(samples, LONGEST, dtype=torch.float64),
        finished=torch.tensor([row[-1] == STOP for row in rows]),
        prompt_index=torch.zeros(samples, dtype=torch.long), group_ids=torch.arange(samples) // group,
        prompts=("",) * samples, responses=("",) * samples, metadata=({},) * samples, policy_version=0,
    )  # fmt: skip


class Exact(ExperienceMaker):
    """The maker, with a batch that is given in place of samples."""

    batch: Rollout

    def draw(self, *_: Any) -> Rollout:
        return self.batch

    def sample(self, *_: Any) -> Rollout:
        return self.batch


def gradient(
    reference_kl: ReferenceKL, roles: Table, *, whiten_rewards: bool, whiten_advantages: bool, advantage: Any,
    policy_loss: Any, aggregation: Callable[[Tensor], Tensor], greedy: float = 0.0,
) -> tuple[Tensor, Experience]:  # fmt: skip
    """The gradient of the policy's loss at the first minibatch, which is the whole batch."""
    maker = Exact(
        reference_kl=reference_kl, kl_controller=FixedKL(BETA), advantage=Centered(advantage, greedy),
        shaping=ScoreShaping(NoScaling(), None, IgnoreMissingEos()),
        whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages, batch_size=ROWS,
    )  # fmt: skip
    maker.batch = rollout([row for row, share in RESPONSES.items() for _ in range(int(share * ROWS))], ROWS)
    reward = Score(roles.heads["reference"].weight.t().detach())
    prompts: Any = None
    experience, _ = maker.make(roles, reward, prompts, 0, torch.Generator())
    module = PPOModule(
        roles, reward, policy_loss=policy_loss, value_loss=None, reference_kl=reference_kl.estimator,
        aggregation=aggregation,
    )  # fmt: skip
    loss = module.objective.loss(experience, aggregation(experience.mask).double(), WeightedMeans())
    (found,) = torch.autograd.grad(loss, roles.policy_parameters())
    return found, experience


class Centered:
    """An estimator as the maker asks for it; one that needs a greedy response gets its score."""

    def __init__(self, inner: Any, greedy: float) -> None:
        self.inner, self.greedy = inner, greedy
        self.needs_values, self.needs_greedy = inner.needs_values, False

    def advantages(self, episodes: Episodes) -> Tensor:
        """Phi_t."""
        if self.inner.needs_greedy:
            scores = torch.full((len(episodes.rewards),), self.greedy, dtype=torch.float64)
            episodes = Episodes(rewards=episodes.rewards, mask=episodes.mask, group_ids=episodes.group_ids,
                                greedy_scores=scores)  # fmt: skip
        found: Tensor = self.inner.advantages(episodes)
        rows = len(episodes.rewards)  # each row's baseline leaves it out, which a sample of them would not notice
        return found * (rows - 1) / rows if isinstance(self.inner, LeaveOneOut) else found

    def returns(self, episodes: Episodes) -> Tensor | None:
        """Targets that nobody learns."""
        return None

    def update(self, episodes: Episodes) -> None:
        """Nothing is remembered."""
