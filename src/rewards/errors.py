"""What goes wrong with a reward, in one sentence."""

from __future__ import annotations


class RewardError(RuntimeError):
    """A reward cannot judge: the message names the reward, the text and what came back."""
