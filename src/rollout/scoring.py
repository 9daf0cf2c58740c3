"""Scoring a rollout with any reward: every score is checked; a sample that fails is named or dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import chdir
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from src.core.masking import masked
from src.errors import RewardError, require
from src.rewards.adapter import AdapterReward
from src.rewards.answers import as_numbers, reward_name
from src.rewards.learned import LearnedReward
from src.types import AnyReward, PartedReward, Reward, Rollout, RolloutReward, TokenReward, select
from src.utils.distributed import map_over_ranks
from src.utils.exits import REWARD_THREAD

# scores (N,), NaN where there is none; credit (N, T); parts of the scores; error of the first failure
Answers = tuple[Tensor, Tensor, dict[str, Tensor], RewardError | None]

# scores (N,) or (N, T); parts; faults: row -> what the reward raised there, or gave instead of a number
Called = tuple[Tensor, dict[str, Tensor], dict[int, Any]]

MADE_UP: tuple[list[str], list[str], list[dict[str, Any]]] = (
    ["This film", "The weather"], [" was a joy to watch.", " is fine today"], [{"finished": True}, {"finished": False}],
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A rollout with the scores of a reward."""

    rollout: Rollout  # B rows: those that were scored
    scores: Tensor  # (B,) finite
    credit: Tensor  # (B, T) part of the score that belongs to each token; 0 for a reward per sequence
    parts: dict[str, Tensor]  # (B,) each, of a mixed reward, unweighted
    dropped: int  # rows left out

    def only(self, kept: Tensor) -> Scored:
        """The rows `kept` (K,) int64; the others count as dropped."""
        if len(kept) == len(self.scores):
            return self
        parts = {name: part[kept.cpu()] for name, part in self.parts.items()}
        dropped = self.dropped + len(self.scores) - len(kept)
        return Scored(select(self.rollout, kept), self.scores[kept], self.credit[kept], parts, dropped)


@dataclass(frozen=True)
class Scorer:
    """Calls a reward, for at most `timeout` seconds (None: no limit), and handles samples that fail.

    A sample fails when its score is not finite or the reward raises on it. With `drop_failed` it is dropped and
    counted; without, or when no sample is left, the run stops.
    """

    timeout: float | None = 600.0
    drop_failed: bool = False

    def __post_init__(self) -> None:
        """Refuse a limit that no reward can meet."""
        require(self.timeout is None or self.timeout > 0, "timeout", self.timeout, "greater than 0 seconds, or null")

    def score(self, reward: AnyReward, rollout: Rollout) -> Scored:
        """Score every row, each rank its own. Raises `RewardError` with the reward, the prompt and the answer."""
        own = self._answers_of_ranks(reward, rollout)
        scores, credit = (torch.cat(given) for given in list(zip(*own, strict=True))[:2])
        names = {name: None for _, _, parts, _ in own for name in parts}
        none = [torch.full(scores.shape, torch.nan) for scores, *_ in own]  # where a rank has no row with an answer
        parts = {n: torch.cat([given[2].get(n, nan) for given, nan in zip(own, none, strict=True)]) for n in names}
        kept = scores.isfinite().nonzero().flatten()
        if not len(kept):
            raise next(failure for *_, failure in own if failure is not None)
        return Scored(rollout, scores, credit, parts, 0).only(kept)

    def scores(self, reward: AnyReward, rollout: Rollout) -> Tensor:
        """r(x, y) of every row, (B,); NaN for a row that failed, even if all did.

        Raises `RewardError` as `score` does without `drop_failed`.
        """
        scores = torch.cat([given for given, *_ in self._answers_of_ranks(reward, rollout)])
        return scores.where(scores.isfinite(), torch.nan)

    def try_out(self, reward: Reward) -> None:
        """Call a reward once, with two rows that are made up, before anything is trained for it.

        Raises `RewardError` for what no other rows can mend: a returned value that is not one number per response, a
        name or module that does not exist, no answer in time. Any other error may come from the columns that only the
        data have, and a score that is no number from the texts: those wait for real rows.
        """
        try:
            given, _ = self._within_limit(reward, partial(call_with_texts, reward, *MADE_UP))
            as_numbers(reward, given, torch.Size([len(MADE_UP[0])]))
        except RewardError as error:
            raise RewardError(f"{error} (tried with 2 made-up rows)") from error
        except UnboundLocalError:  # of a branch that other texts may take
            return
        except (NameError, ImportError) as error:
            raise RewardError(f"reward {reward_name(reward)} raised {error!r} (tried with 2 made-up rows)") from error
        except Exception:
            return

    def _answers_of_ranks(self, reward: AnyReward, rollout: Rollout) -> list[Answers]:
        """The answers to each rank for its rows."""
        return map_over_ranks(lambda share: self._answers(reward, select(rollout, share.index)), len(rollout.prompts))

    def _answers(self, reward: AnyReward, rollout: Rollout) -> Answers:
        given, parts, faults = self._call(reward, rollout)
        scores, credit = given.to(rollout.finished.device), torch.zeros_like(rollout.behavior_logprobs)
        if isinstance(reward, TokenReward):
            if scores.dim() == 1:  # the reward raised on every row
                scores = scores.unsqueeze(1).expand_as(credit)
            credit = masked(scores, rollout.response_mask)
            scores = credit.sum(dim=1)
        failure = first_failure(reward, rollout, scores, faults)
        if failure is not None and not self.drop_failed:
            raise failure
        return scores, credit, {name: part.cpu() for name, part in parts.items()}, failure

    def _call(self, reward: AnyReward, rollout: Rollout) -> Called:
        """Scores (or each token's), parts and faults.

        Calls the reward once with all rows; if that raises, row by row.
        """
        try:
            return self._within_limit(reward, partial(call_reward, reward, rollout))
        except RewardError:
            raise
        except Exception as error:  # a user's function may raise anything
            answers: list[tuple[Tensor, dict[str, Tensor]]] = []
            raised: dict[int, Any] = {}
            others: dict[int, Any] = {}
            for row in range(len(rollout.prompts)):
                one = select(rollout, torch.tensor([row]))
                try:
                    scores, parts, other = self._within_limit(reward, partial(call_reward, reward, one))
                except RewardError:  # a wrong shape or a timeout: not the fault of one sample
                    raise
                except Exception as own:
                    raised[row] = own
                else:
                    answers.append((scores, parts))
                    others.update((row, element) for element in other.values())
            if not raised:
                message = f"reward {reward_name(reward)} raised {error!r} for the batch, and for no row of it alone"
                raise RewardError(message) from error
            return *merge_rows(answers, list(raised), len(rollout.prompts)), raised | others

    def _within_limit(self, reward: Any, call: Callable[[], Any]) -> Any:
        """The result of `call` within the time limit; this project's reward models cannot hang and have no limit."""
        if self.timeout is None or isinstance(reward, LearnedReward | AdapterReward):
            return call()
        box: dict[str, Any] = {}

        def work() -> None:
            try:
                box["result"] = call()
            except BaseException as error:  # raised again in the waiting thread
                box["error"] = error

        thread = threading.Thread(target=work, daemon=True, name=REWARD_THREAD)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise RewardError(
                f"reward {reward_name(reward)} gave no answer within {self.timeout:g} s (ppo.reward_timeout)"
            )
        if "error" in box:
            raise box["error"]
        return box["result"]


def call_reward(reward: AnyReward, rollout: Rollout) -> Called:
    """Scores (B,) float32, not yet checked to be finite, the parts of a mixed reward, and faults.

    The scores of a reward per token are (B, T). Raises `RewardError` for an answer of another shape.
    """
    if isinstance(reward, TokenReward):
        scores, others = as_numbers(reward, reward.score_tokens(rollout), rollout.response_mask.shape, "tokens")
        return scores, {}, others
    if isinstance(reward, RolloutReward):
        scores, others = as_numbers(reward, reward.score_rollout(rollout), rollout.finished.shape)
        return scores, {}, others
    metadata = [
        deepcopy(row) | {"finished": finished}  # a reward may change what it is given
        for row, finished in zip(rollout.metadata, rollout.finished.tolist(), strict=True)
    ]
    given, parts = call_with_texts(reward, list(rollout.prompts), list(rollout.responses), metadata)
    scores, others = as_numbers(reward, given, rollout.finished.shape)
    return scores, parts, others


def call_with_texts(
    reward: Reward | PartedReward, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
) -> tuple[Any, dict[str, Tensor]]:
    """What a reward returns for texts, and its parts but for one that is the score itself.

    Raises `RewardError` if it ends the program.
    """
    try:
        with chdir("."):  # wherever a reward goes, the run's paths lead to the same places after it
            if isinstance(reward, PartedReward):
                parts = reward.score_parts(prompts, responses, metadata)
                scores = reward.combine(parts)
                return scores, {name: part for name, part in parts.items() if part is not scores}
            return reward.score(prompts, responses, metadata), {}
    except SystemExit as error:  # would end the run without a message
        raise RewardError(f"reward {reward_name(reward)} ended the program by sys.exit({error.code!r})") from error


def first_failure(reward: Any, rollout: Rollout, scores: Tensor, faults: dict[int, Any]) -> RewardError | None:
    """The error of the first row without a finite score; None when every row has one."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    row = bad[0]
    fault = faults.get(row, scores[row].item())
    what = f"raised {fault!r}" if isinstance(fault, Exception) else f"gave {fault!r:.80}"
    error = RewardError(
        f"reward {reward_name(reward)} {what} for prompt {rollout.prompts[row]!r}, "
        f"response {rollout.responses[row]!r}; a score must be a finite number"
    )
    error.__cause__ = fault if isinstance(fault, Exception) else None
    return error


def merge_rows(
    answers: list[tuple[Tensor, dict[str, Tensor]]], without: list[int], rows: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and parts of single rows, joined to (rows, ...) each; NaN for the rows in `without`."""
    answered = torch.tensor([row for row in range(rows) if row not in without], dtype=torch.long)

    def joined(pieces: list[Tensor]) -> Tensor:
        whole = torch.full((rows, *pieces[0].shape[1:]), torch.nan)
        whole[answered] = torch.cat(pieces).cpu()
        return whole

    if not answers:
        return torch.full((rows,), torch.nan), {}
    return joined([scores for scores, _ in answers]), {
        name: joined([parts[name] for _, parts in answers]) for name in answers[0][1]
    }
