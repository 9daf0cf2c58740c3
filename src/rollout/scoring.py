"""Scoring a rollout with any reward: every score is checked; a sample that fails is named or dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from src.core.masking import masked
from src.errors import RewardError, require
from src.rewards.adapter import AdapterReward
from src.rewards.learned import LearnedReward
from src.types import AnyReward, PartedReward, Rollout, RolloutReward, TokenReward, select
from src.utils.distributed import map_over_ranks

# scores (N,), NaN where there is none; credit (N, T); parts of the scores; error of the first failure
Answers = tuple[Tensor, Tensor, dict[str, Tensor], RewardError | None]


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

    def _answers_of_ranks(self, reward: AnyReward, rollout: Rollout) -> list[Answers]:
        """The answers to each rank for its rows."""
        return map_over_ranks(lambda share: self._answers(reward, select(rollout, share.index)), len(rollout.prompts))

    def _answers(self, reward: AnyReward, rollout: Rollout) -> Answers:
        given, parts, raised = self._call(reward, rollout)
        scores, credit = given.to(rollout.finished.device), torch.zeros_like(rollout.behavior_logprobs)
        if isinstance(reward, TokenReward):
            if scores.dim() == 1:  # the reward raised on every row
                scores = scores.unsqueeze(1).expand_as(credit)
            credit = masked(scores, rollout.response_mask)
            scores = credit.sum(dim=1)
        failure = first_failure(reward, rollout, scores, raised)
        if failure is not None and not self.drop_failed:
            raise failure
        return scores, credit, {name: part.cpu() for name, part in parts.items()}, failure

    def _call(self, reward: AnyReward, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor], dict[int, Exception]]:
        """Scores (or each token's), parts and the rows on which the reward raised.

        Calls the reward once with all rows; if that raises, row by row.
        """
        try:
            scores, parts = self._within_limit(reward, partial(call_reward, reward, rollout))
            return scores, parts, {}
        except RewardError:
            raise
        except Exception as error:  # a user's function may raise anything
            answers: list[tuple[Tensor, dict[str, Tensor]]] = []
            raised: dict[int, Exception] = {}
            for row in range(len(rollout.prompts)):
                one = select(rollout, torch.tensor([row]))
                try:
                    answers.append(self._within_limit(reward, partial(call_reward, reward, one)))
                except RewardError:  # a wrong shape or a timeout: not the fault of one sample
                    raise
                except Exception as own:
                    raised[row] = own
            if not raised:
                message = f"reward {reward_name(reward)} raised {error!r} for the batch, and for no row of it alone"
                raise RewardError(message) from error
            return *merge_rows(answers, list(raised), len(rollout.prompts)), raised

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

        thread = threading.Thread(target=work, daemon=True, name="reward")
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise RewardError(
                f"reward {reward_name(reward)} gave no answer within {self.timeout:g} s (ppo.reward_timeout)"
            )
        if "error" in box:
            raise box["error"]
        return box["result"]


def call_reward(reward: AnyReward, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores (B,) float32, not yet checked to be finite, and the parts of a mixed reward. Raises for a wrong count.

    The scores of a reward per token are (B, T).
    """
    if isinstance(reward, TokenReward):
        return check_scores(reward, reward.score_tokens(rollout), rollout.response_mask, "tokens"), {}
    if isinstance(reward, RolloutReward):
        return check_scores(reward, reward.score_rollout(rollout), rollout.finished, "sequences"), {}
    metadata = [
        row | {"finished": finished} for row, finished in zip(rollout.metadata, rollout.finished.tolist(), strict=True)
    ]
    texts = list(rollout.prompts), list(rollout.responses)
    try:
        parts = reward.score_parts(*texts, metadata) if isinstance(reward, PartedReward) else {}
        given = reward.combine(parts) if isinstance(reward, PartedReward) else reward.score(*texts, metadata)
    except SystemExit as error:  # would end the run without a message
        raise RewardError(f"reward {reward_name(reward)} ended the program by sys.exit({error.code!r})") from error
    return check_scores(reward, given, rollout.finished, "sequences"), parts


def check_scores(reward: AnyReward, given: Any, wanted: Tensor, what: str) -> Tensor:
    """A reward's answer as float32 in the shape of `wanted`, a number for each of `what`; not yet checked to be finite.

    Raises for an answer that is not numeric or has another shape.
    """
    count = wanted.numel()
    try:
        scores = torch.as_tensor(given, dtype=torch.float32).detach()
    except (TypeError, ValueError) as error:
        raise ValueError(f"gave {str(given)[:80]} where {count} numbers are needed") from error
    if scores.shape != wanted.shape:
        rows = f"{count}" if wanted.dim() == 1 else f"{tuple(wanted.shape)}"
        gave = "a single number" if scores.dim() == 0 else f"{tuple(scores.shape)} scores"
        raise RewardError(f"reward {reward_name(reward)} gave {gave} for {rows} {what}: one for each is needed")
    return scores


def first_failure(reward: Any, rollout: Rollout, scores: Tensor, raised: dict[int, Exception]) -> RewardError | None:
    """The error of the first row without a finite score; None when every row has one."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return None
    row = bad[0]
    what = f"raised {raised[row]!r}" if row in raised else f"gave {scores[row].item()}"
    error = RewardError(
        f"reward {reward_name(reward)} {what} for prompt {rollout.prompts[row]!r}, "
        f"response {rollout.responses[row]!r}; a score must be a finite number"
    )
    error.__cause__ = raised.get(row)
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


def reward_name(reward: Any) -> str:
    """The name of a reward in messages: a function's dotted path, else the class."""
    return str(getattr(reward, "target", type(reward).__name__))
