"""The work of one PPO iteration on one of N ranks, by phase and role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from src.plan.work import Rows, Shape, Work, decode, forward, learn

FLOAT32 = 4  # bytes of a number of an adapter, whatever the base's dtype


@dataclass(frozen=True)
class Sizes:
    """Sizes of an iteration, over all ranks."""

    rows: int  # responses
    samples: int  # responses to each prompt
    prompt: float  # tokens
    response: float
    epochs: int
    minibatch: int
    micro: int
    scoring: int  # rows of a pass that scores
    greedy: bool = False  # also a greedy response to each prompt

    @property
    def steps(self) -> int:
        """Optimizer steps of a role."""
        return self.epochs * -(-self.rows // self.minibatch)


@dataclass(frozen=True)
class Roles:
    """Who takes part, and which layers they adapt."""

    policy: Shape
    base: float  # bytes of the weights of a whole model
    gradients: Mapping[str, float]  # bytes of the gradients of each trained role
    rewards: Sequence[Shape]  # of the reward models
    policy_layers: int | None  # top layers with adapters; None: every weight is trained
    critic_layers: int | None
    reference: bool
    trunk: int = 0  # layers below, whose output is computed once: for critic and reference, and if they are all that
    policy_on_trunk: bool = False  # the policy has no adapters in either, for the policy too
    entropy: bool = False
    checkpointing: bool = False
    local: bool = True  # the policy samples itself; an engine reads merged weights

    @property
    def critic(self) -> bool:
        """Whether there is one."""
        return "critic" in self.gradients

    def updates(self, role: str) -> float:
        """Numbers that an optimizer step of the role changes."""
        return self.gradients[role] / (self.policy.size if self.policy_layers is None else FLOAT32)


@dataclass(frozen=True)
class Ranks:
    """Processes that train as one."""

    count: int = 1
    sharded: bool = False

    @property
    def others(self) -> float:
        """Share of a tensor that other ranks hold."""
        return (self.count - 1) / self.count


Plan = dict[tuple[str, str], Work]  # (phase, role) -> work of one rank
ROLLOUT, SCORING, TRAINING, OPTIMIZER, SYNCHRONIZATION = "rollout", "scoring", "training", "optimizer", "between ranks"


def iteration(roles: Roles, sizes: Sizes, ranks: Ranks = Ranks()) -> Plan:
    """The work of one rank; phases follow one another."""
    work = _rollout(roles, sizes, ranks) | _scoring(roles, sizes, ranks) | _training(roles, sizes, ranks)
    if ranks.count > 1:
        work[SYNCHRONIZATION, ""] = _between(roles, sizes, ranks)
    return work


def _rollout(roles: Roles, sizes: Sizes, ranks: Ranks) -> Plan:
    shape, rows, prompts = roles.policy, sizes.rows / ranks.count, sizes.rows / sizes.samples / ranks.count
    adapted = (roles.policy_layers or 0) if roles.local else 0
    work = decode(shape, rows, prompts, sizes.prompt, sizes.response, adapted)
    if sizes.greedy:
        work = work + decode(shape, prompts, prompts, sizes.prompt, sizes.response, adapted)
    return {(ROLLOUT, "policy"): work}


def _scoring(roles: Roles, sizes: Sizes, ranks: Ranks) -> Plan:
    """Passes without gradient over all rows: the trunk once, then each role above it."""
    shape, (size, passes) = roles.policy, pieces(sizes.rows, sizes.scoring, ranks.count)
    whole, read = Rows(size, sizes.prompt + sizes.response), Rows(size, sizes.prompt + sizes.response, sizes.response)
    above, adapted = shape.layers - roles.trunk, roles.policy_layers or 0
    work = {(SCORING, "policy"): forward(shape, read, _layers(roles, "policy"), adapted)}
    if roles.trunk:
        work[SCORING, "shared layers"] = forward(shape, whole, roles.trunk)
    if roles.reference:
        work[SCORING, "reference"] = forward(shape, read, above)
    if roles.critic:
        work[SCORING, "critic"] = forward(shape, whole, above, roles.critic_layers or 0)
    for reward in roles.rewards:
        work[SCORING, "reward"] = work.get((SCORING, "reward"), Work()) + forward(reward, whole, reward.layers)
    return {key: one * passes for key, one in work.items()}


def _training(roles: Roles, sizes: Sizes, ranks: Ranks) -> Plan:
    """Micro-batches of every minibatch of every epoch, and a step of each optimizer per minibatch."""
    size, passes = pieces(sizes.minibatch, sizes.micro, ranks.count)
    work = {}
    for role in roles.gradients:
        policy = role == "policy"
        rows = Rows(size, sizes.prompt + sizes.response, sizes.response if policy else 0)
        adapted = roles.policy_layers if policy else roles.critic_layers
        one = learn(roles.policy, rows, _layers(roles, role), adapted, policy and roles.entropy, roles.checkpointing)
        work[TRAINING, role] = one * (passes * sizes.epochs * sizes.rows / sizes.minibatch)
        own = roles.updates(role) / (ranks.count if ranks.sharded else 1)
        work[OPTIMIZER, role] = Work(updates=sizes.steps * own)
    return work


def _layers(roles: Roles, role: str) -> int:
    """Layers that a pass of the role runs through."""
    return roles.policy.layers - (roles.trunk if role != "policy" or roles.policy_on_trunk else 0)


def _between(roles: Roles, sizes: Sizes, ranks: Ranks) -> Work:
    """Bytes that a rank sends: gradients summed in a ring; with shards also weights before each pass, and gathered.

    A sum sends each number twice, as a part and as the result; with shards once. A sharded pass gathers the weights it
    reads, forward and backward, and sampling gathers the model once.
    """
    trained = sum(roles.gradients.values())
    if not ranks.sharded:
        return Work(sent=2 * ranks.others * trained * sizes.steps)
    _, scoring = pieces(sizes.rows, sizes.scoring, ranks.count)
    _, training = pieces(sizes.minibatch, sizes.micro, ranks.count)
    read = 1 + scoring * (1 + roles.reference + roles.critic) + 2 * training * sizes.steps * (1 + roles.critic)
    return Work(sent=ranks.others * (roles.base * read + trained * training * sizes.steps))


def pieces(rows: int, size: int, ranks: int) -> tuple[float, float]:
    """Rows of a pass on one rank, and how many such passes it makes."""
    own = rows / ranks
    passes = -(-own // min(size, own)) if own >= 1 else 1
    return own / passes, passes
