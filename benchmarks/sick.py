"""Sick runs of the sentiment experiment, each with one planted mistake, for the tests of bands and alarms.

    python -m benchmarks.sick mask_early

Starts from the SFT and reward model of seed 1 of `python -m benchmarks.seeds sentiment`, runs PPO with the mistake, and
writes its logged numbers to tests/report/recorded/sick/sentiment_MISTAKE.csv. A response mask that is shifted when the
responses are drawn is refused by the sampler check, so the shifts are where nothing compares:

    wrong_sign      the KL in reward and log has the wrong sign
    lr_times_30     30 times the learning rate
    mask_early      the loss gives each token the advantage of the next one: its slice of the log-probabilities includes
                    the last prompt token and leaves out the end token
    mask_late       the loss leaves out the first token and includes the one after the end
    values_late     the values are read after the token, not before it
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import src.core.kl
from benchmarks.bands import RECORDED, write_short
from benchmarks.seeds import newest_result, run
from src.loggers.csv import read_table
from src.modules.ppo import PPOModule
from src.rollout.experience import ExperienceMaker
from src.runs.start import start
from src.types import Experience


def earlier(x: Tensor) -> Tensor:
    """At each place the number of the next one; 0 at the last."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def later(x: Tensor) -> Tensor:
    """At each place the number of the one before; 0 at the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def in_loss(change: Callable[[Experience], Experience]) -> None:
    """Change every minibatch before it is learned from."""
    learn = PPOModule._learn_minibatch
    PPOModule._learn_minibatch = lambda self, minibatch, *rest: learn(self, change(minibatch), *rest)


def wrong_sign() -> None:
    """Plant it."""
    src.core.kl.k1 = lambda logprobs, other_logprobs: other_logprobs - logprobs


def mask_early() -> None:
    """Plant it."""
    in_loss(lambda whole: replace(whole, advantages=earlier(whole.advantages)))


def mask_late() -> None:
    """Plant it."""
    in_loss(lambda whole: replace(whole, rollout=replace(whole.rollout, response_mask=later(whole.mask))))


def values_late() -> None:
    """Plant it."""
    outputs = ExperienceMaker._model_outputs

    def shifted(self, roles, rollout):
        found = outputs(self, roles, rollout)
        return replace(found, values=earlier(found.values) * rollout.response_mask)

    ExperienceMaker._model_outputs = shifted


MISTAKES: dict[str, Callable[[], None] | list[str]] = {
    "wrong_sign": wrong_sign,
    "lr_times_30": ["ppo.lr=3.0e-2"],
    "mask_early": mask_early,
    "mask_late": mask_late,
    "values_late": values_late,
}


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mistake", choices=MISTAKES)
    name = parser.parse_args().mistake
    mistake, healthy = MISTAKES[name], run("sentiment", "sentiment", 1, [])
    if callable(mistake):
        mistake()
    changed = [] if callable(mistake) else mistake
    models = [f"model.path={healthy / 'sft' / 'model'}", f"reward.path={healthy / 'reward'}"]
    start(["experiment=sentiment", *models, f"name=sick-{name}", *changed])
    metrics = newest_result(Path("logs/ppo"), f"sick-{name}").with_name("metrics.csv")
    write_short(read_table(metrics), RECORDED / "sick" / f"sentiment_{name}.csv")


if __name__ == "__main__":
    main()
