"""A process reward: a score for each step of a response."""

from __future__ import annotations

import re
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from src.errors import RewardError, require
from src.models.roles import Roles
from src.models.text import response_text
from src.rewards.answers import as_numbers
from src.types import LoadedReward, Reward, Rollout


class StepReward(nn.Module):
    """Credits the last token of each step with the score of that step, step(x y_1 .. y_k-1, y_k).

    A step ends where the pattern `separator` ends, and at the end of the response; white space alone is no step, it
    belongs to the next one, or at the end to the last. `step` scores texts: it gets prompt and earlier steps as the
    prompt, the step as the response, and of the last step alone whether the response is finished. The score of a
    response is the sum over its steps, or their `mean`, so that more steps are no more reward. A token that ends
    several steps gets their sum. Call `load` first.
    """

    def __init__(self, step: Reward, separator: str, mean: bool) -> None:
        super().__init__()
        require(hasattr(step, "score"), "step", type(step).__name__, "a reward that scores text")
        require(re.fullmatch(separator, "") is None, "separator", separator, "a pattern that does not match nothing")
        self.step, self.separator, self.mean = step, re.compile(separator), mean
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def load(self, roles: Roles | None = None) -> StepReward:
        """Take the policy's tokenizer, and load the weights of `step`. Raises `RewardError` without roles."""
        if roles is None:
            raise RewardError("reward=steps credits tokens, so it needs the policy: serve the reward of a step instead")
        self.tokenizer = roles.tokenizer
        if isinstance(self.step, LoadedReward):
            self.step.load(roles)
        return self

    def score_tokens(self, rollout: Rollout) -> Tensor:
        """r_t, (B, T), 0 but at the ends of steps; NaN where `step` gives no number."""
        ends = [self._ends(text) for text in rollout.responses]
        prompts, responses, metadata, places = [], [], [], []
        for row, (prompt, text) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            tokens = self._tokens(rollout, row, ends[row])
            for start, end, token in zip([0, *ends[row]], ends[row], tokens, strict=False):
                prompts.append(prompt + text[:start])
                responses.append(text[start:end])
                ended = end == len(text) and bool(rollout.finished[row])
                metadata.append(deepcopy(rollout.metadata[row]) | {"finished": ended})
                places.append((row, token))
        given = self.step.score(prompts, responses, metadata)
        scores, _ = as_numbers(self.step, given, torch.Size([len(prompts)]), "steps")
        credit = torch.zeros(rollout.response_mask.shape)
        rows, columns = torch.tensor(places).T
        shares = torch.tensor([len(row) for row in ends])[rows] if self.mean else 1
        credit.index_put_((rows, columns), scores.cpu() / shares, accumulate=True)
        return credit.to(rollout.response_mask.device)

    def _ends(self, text: str) -> list[int]:
        """Where steps end in a text, in characters; the last one at its end."""
        inside = [found.end() for found in self.separator.finditer(text)]
        ends = [end for start, end in zip([0, *inside], inside, strict=False) if text[start:end].strip()]
        ends = [end for end in ends if text[end:].strip()]
        return [*ends, len(text)]

    def _tokens(self, rollout: Rollout, row: int, ends: list[int]) -> list[int]:
        """The token that completes each step: the first after which the decoded response is as long."""
        assert self.tokenizer is not None, "load() was not called"
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        ids = rollout.response_ids[row][rollout.response_mask[row]]
        tokens: list[int] = []
        for end in ends[:-1]:
            low, high = tokens[-1] if tokens else 0, len(ids) - 1
            while low < high:  # the decoded text grows with every token, so halves can be left out
                middle = (low + high) // 2
                text = response_text(self.tokenizer, prompt, ids[: middle + 1])
                whole = len(text.rstrip("\ufffd")) >= end  # without a character of which some bytes are missing
                low, high = (low, middle) if whole else (middle + 1, high)
            tokens.append(low)
        return [*tokens, len(ids) - 1]  # an end token belongs to the last step
