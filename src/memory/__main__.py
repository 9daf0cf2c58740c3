"""How much memory a PPO run takes, before anything is loaded.

python -m src.memory                                     the embedded default
python -m src.memory model=gpt2 ppo.micro_batch_size=8   another model, another size
python -m src.memory model.lora=null                     every weight trained

Each row is what a role or phase takes at its fullest; weights and Adam's states stay, phases follow one another. A
model is known by its config.json: weights are not needed.
"""

from __future__ import annotations

import argparse

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from src.config.compose import compose, instantiate
from src.config.validate import preflight
from src.memory.estimate import Ledger, Workload, ledger
from src.models.loading import load_config
from src.models.settings import ModelSettings
from src.runs.report import friendly_errors, quiet_libraries

WORTH_SAYING = 5 * 10**7  # weights
WIDTHS = {"weights": "weights", "gradients": "gradients", "optimizer": "Adam"}


def ledger_of(config: DictConfig) -> Ledger:
    """The ledger of a PPO configuration."""
    model: ModelSettings = instantiate(config.model)
    ppo, rollout = config.ppo, config.rollout
    load = Workload(
        rollout_rows=ppo.batch_size,
        scoring_rows=min(rollout.scoring_batch_size, ppo.batch_size),
        update_rows=min(ppo.micro_batch_size, ppo.minibatch_size),
        prompt_tokens=rollout.max_prompt_tokens,
        response_tokens=rollout.max_new_tokens,
    )
    critic = ppo.value_loss is not None
    return ledger(architecture(model), model, _reward_architecture(config), load, critic)


def architecture(model: ModelSettings) -> PretrainedConfig:
    """That of a folder or hub name, or the one made from scratch."""
    if model.path is not None:
        return load_config(model.path, trusted=model.trust_remote_code)
    assert model.scratch is not None  # ModelSettings refuses a model from nowhere
    return model.scratch.config()


def _reward_architecture(config: DictConfig) -> PretrainedConfig | None:
    """Of a learned reward that has a folder; the embedded ones are too small to count."""
    path = config.reward.get("path") if "LearnedReward" in str(config.reward) else None
    return None if path is None else load_config(path, "reward.path")


def ledger_table(said: Ledger) -> Table:
    """Roles first, then phases, then the peak."""
    table = Table(title=f"memory at most {readable(said.peak)}, found out without loading anything")
    for column in ("", *WIDTHS.values(), "passing"):
        table.add_column(column, justify="left" if not column else "right")
    for role, weights in said.weights.items():
        parts = [weights, said.gradients.get(role, 0), said.optimizer.get(role, 0)]
        table.add_row(role, *(readable(part) if part else "" for part in parts), "")
    table.add_section()
    for phase, taken in said.phases.items():
        table.add_row(phase, "", "", "", readable(taken))
    return table


def say_memory(config: DictConfig) -> None:
    """Print the ledger of a PPO run whose model is so large that memory is a question.

    An estimate must not cost a run: an architecture that cannot be laid out on fake tensors is said, and no more.
    """
    model: ModelSettings = instantiate(config.model)
    if config.stage != "ppo" or weights_of(architecture(model)) < WORTH_SAYING:
        return
    try:
        Console().print(ledger_table(ledger_of(config)))
    except Exception as error:
        print(f"how much memory this run takes cannot be told beforehand: {type(error).__name__}: {error}")


def weights_of(config: PretrainedConfig) -> int:
    """The number of weights of an architecture, laid out without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def readable(size: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value or group=option, as for python -m src.train")
    overrides = parser.parse_args().overrides
    quiet_libraries()
    with friendly_errors(overrides):
        config = compose(["stage=ppo", *overrides])
        config.run_dir = config.log_dir  # asked for by the checks; nothing is written there
        preflight(config)
        Console().print(ledger_table(ledger_of(config)))


if __name__ == "__main__":
    main()
