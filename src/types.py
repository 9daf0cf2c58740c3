"""The records that travel between the rooms; the only place where their shapes are defined.

Letters: B sequences, P prompt length, T response length, S = P + T (tokens).
Every mask is True where the element counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from src.errors import DataError

Record = TypeVar("Record", bound="Rollout | Experience")
Scores = Tensor | Sequence[float]
Rows = TypeVar("Rows", bound="Prompts | Rollout | Experience")


@dataclass(frozen=True)
class PromptRow:
    """One prompt with the other columns of its data row (a reference answer, say)."""

    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two completions of one prompt, `chosen` preferred to `rejected`.

    `gap` is how far apart the two truly are on the scale of their true scores (>= 0), when that is known.
    """

    prompt: str
    chosen: str
    rejected: str
    gap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of tokenized prompts, padded on the left."""

    ids: Tensor  # (B, P) int64
    mask: Tensor  # (B, P) bool
    index: Tensor  # (B,) int64, row of the prompt in its data set
    group_ids: Tensor  # (B,) int64, equal for samples of the same prompt in this batch
    texts: tuple[str, ...]  # B strings
    metadata: tuple[dict[str, Any], ...]  # B dictionaries


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled responses, before anything was scored."""

    prompt_ids: Tensor  # (B, P) int64, padded on the left
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, T) int64, padded on the right
    response_mask: Tensor  # (B, T) bool, True up to and including the first stop token
    behavior_logprobs: Tensor  # (B, T) nats, log pi of the sampling engine; 0 outside the mask
    finished: Tensor  # (B,) bool, the response ended with a stop token
    prompt_index: Tensor  # (B,) int64
    group_ids: Tensor  # (B,) int64
    prompts: tuple[str, ...]  # B strings
    responses: tuple[str, ...]  # B strings; prompt + response is the whole text
    metadata: tuple[dict[str, Any], ...]  # B dictionaries
    policy_version: int  # number of PPO iterations finished when this was sampled
    trunk: Tensor | None = None  # (B, P + T, H) output of the layers that no role adapts, where it is kept


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What credit assignment sees of a batch of responses."""

    rewards: Tensor  # (B, T) r_t
    mask: Tensor  # (B, T) bool
    group_ids: Tensor  # (B,) int64, equal for samples of the same prompt
    old_values: Tensor | None = None  # (B, T) V_old(s_t); None without a critic
    greedy_scores: Tensor | None = None  # (B,) shaped score of the greedy response to the prompt, when asked for


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A scored rollout, ready to learn from. Everything is detached; all (B, T) tensors are 0 outside the mask."""

    rollout: Rollout
    old_logprobs: Tensor  # (B, T) nats, log pi_old(a_t | s_t), recomputed by the training path
    ref_logprobs: Tensor | None  # (B, T) nats, log pi_ref(a_t | s_t); None when the reference is not asked
    old_values: Tensor | None  # (B, T) V_old(s_t); None without a critic
    scores: Tensor  # (B,) r(x, y), one per sequence, before the KL term
    rewards: Tensor  # (B, T) r_t, shaped score and KL term included
    advantages: Tensor  # (B, T) Phi_t
    returns: Tensor | None  # (B, T) target of the critic; None without one
    loss_kl_coef: float = 0.0  # weight of KL(policy || reference) as a term of the policy's loss
    correction: Tensor | None = None  # (B, T) weight of each token's policy loss; None: 1

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: the response tokens that count."""
        return self.rollout.response_mask

    def __len__(self) -> int:
        return self.rollout.response_ids.shape[0]


class Reward(Protocol):
    """Anything that scores whole sequences."""

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> Scores:
        """r(x, y): one finite number per sequence, in the order given."""
        ...


@runtime_checkable
class TokenReward(Protocol):
    """A reward that credits each token; the score of a sequence is the sum."""

    def score_tokens(self, rollout: Rollout) -> Tensor:
        """r_t before the KL term, (B, T) finite numbers."""
        ...


@runtime_checkable
class RolloutReward(Protocol):
    """A reward that reads the tokens of a rollout, never text that was tokenized again."""

    def score_rollout(self, rollout: Rollout) -> Tensor:
        """r(x, y), (B,) finite numbers."""
        ...


@runtime_checkable
class PartedReward(Protocol):
    """A reward made of several, each worth seeing on its own."""

    def score_parts(
        self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """What each part says, (B,) by name."""
        ...

    def combine(self, parts: dict[str, Tensor]) -> Tensor:
        """The score, (B,)."""
        ...


@runtime_checkable
class LoadedReward(Protocol):
    """A reward with weights, which are loaded after everything else was checked."""

    def load(self, roles: Any) -> Any:
        """Load them; `roles` has the base that an adapter is put on, None where there is none."""
        ...


AnyReward = Reward | TokenReward | RolloutReward | PartedReward


class Corpus(Protocol):
    """Where the text of all three stages comes from; `split` is "train", "validation" or "test".

    A class of your own may inherit from it and define only what its stage reads.
    """

    def texts(self, split: str) -> list[str]:
        """Whole texts to imitate (SFT)."""
        raise DataError(f"{type(self).__name__} has no texts: SFT and PPO-ptx read `texts(split)`")

    def prompts(self, split: str) -> list[PromptRow]:
        """Prompts to answer (PPO)."""
        raise DataError(f"{type(self).__name__} has no prompts: PPO reads `prompts(split)`")

    def pairs(self, split: str) -> list[PreferencePair]:
        """Preference pairs (reward model)."""
        raise DataError(f"{type(self).__name__} has no pairs: the reward model reads `pairs(split)`")

    def quality(self, texts: list[str]) -> dict[str, list[float]]:
        """Exact measures of a text's form, if the corpus knows any: name -> one number in [0, 1] per text."""
        return {}


def select(record: Rows, index: Tensor) -> Rows:
    """Return the rows `index` ((N,) int64) of a record, tensors and tuples alike."""
    rows = index.tolist()

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index]
        if isinstance(value, tuple):
            return tuple(value[row] for row in rows)
        return select(value, index) if isinstance(value, Rollout | Experience) else value

    return type(record)(**{f.name: pick(getattr(record, f.name)) for f in dataclasses.fields(record)})
