"""The memory of a configuration as a table, and when a run shows it."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification, GPT2Config

import src.memory.report
from src.config.compose import compose
from src.config.schema import PPORun
from src.memory.estimate import SAVING, MemoryEstimate, Workload, estimate
from src.memory.report import estimate_of, log_memory, memory_table, readable, weights_of
from src.models.loading import load_config
from src.models.settings import ModelSettings
from src.stages.objects import instantiate
from tests.tiny import FOREIGN_WARNINGS, gpt2_config, write_lm, write_reward_model

pytestmark = FOREIGN_WARNINGS
MIB = 2**20


def configured(path: str, *overrides: str) -> PPORun:
    reward = [] if any(o.startswith("reward=") for o in overrides) else ["reward=vader"]
    run = compose(["model=gpt2", f"model.path={path}", *reward, *overrides])
    assert isinstance(run, PPORun)
    return run


def test_a_run_shows_it_where_the_model_is_large(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it is loaded; of a small one nothing; what cannot be estimated stops no run."""
    caplog.set_level(logging.INFO, "src")
    run = configured(write_lm(tmp_path))
    for large, shown in ((10**9, ""), (1, "at most ")):
        monkeypatch.setattr(src.memory.report, "WORTH_SHOWING", large)
        log_memory(run)
        assert (shown in capsys.readouterr().out) if shown else (capsys.readouterr().out == "")
    monkeypatch.setattr(src.memory.report, "estimate_of", lambda _: int("no number"))
    log_memory(run)
    assert caplog.messages[-1].startswith("how much memory this run takes cannot be estimated: ValueError")


def test_the_estimate_is_that_of_the_configured_sizes(tmp_path: Path) -> None:
    """Passes no larger than the batch and the minibatch; a critic and a reward model where there are some."""
    path, reward = write_lm(tmp_path / "lm"), write_reward_model(tmp_path / "reward" / "model")
    sizes = ["ppo.batch_size=6", "ppo.minibatch_size=3", "rollout.max_prompt_tokens=5", "rollout.max_new_tokens=7"]
    found = estimate_of(configured(path, *sizes, "reward=learned", f"reward.path={tmp_path / 'reward'}"))
    model, load = ModelSettings("gpt2", path), Workload(6, 6, 3, 5, 7)
    assert found == estimate(load_config(path), model, [load_config(reward)], load, critic=True)
    alone = estimate_of(configured(path, *sizes, "advantage=rloo", "rollout.samples_per_prompt=2"))
    assert alone == estimate(load_config(path), model, [], load, critic=False)


def test_every_reward_model_is_counted_whatever_it_is_a_part_of(tmp_path: Path) -> None:
    """A part of a mix, and the gold reward; parts without weights add nothing."""
    path, reward = write_lm(tmp_path / "lm"), write_reward_model(tmp_path / "reward")
    node = f"{{_target_: src.rewards.learned.LearnedReward, path: {reward}}}"
    mix, gold = (
        (f"{key}={option}", f"+{key}.parts.quality={node}", f"+{key}.weights.quality=1.0")
        for key, option in (("reward", "mix"), ("gold_reward", "taste"))
    )
    one, two = (estimate_of(configured(path, *mix, *more)) for more in (["gold_reward=none"], gold))
    plain = estimate_of(configured(path, "gold_reward=none"))
    alone = sum(p.numel() * 4 for p in AutoModelForSequenceClassification.from_pretrained(reward).parameters())
    assert "reward" not in plain.weights
    assert (one.weights["reward"], two.weights["reward"]) == (alone, 2 * alone)
    key = "reward model: hidden states"
    assert one.phases[key] == two.phases[key] > 0
    rest = {name: size for name, size in one.phases.items() if name != key}
    assert rest == plain.phases


@pytest.mark.slow
def test_a_model_from_scratch_has_the_vocabulary_of_its_own_tokenizer() -> None:
    """By hand: the weights of a GPT-2 of 3 layers, 96 wide, with the words of the corpus and not GPT-2's 50,257."""
    run = compose(["model=tiny", "reward=vader"])
    assert isinstance(run, PPORun)
    words = len(instantiate(run.model.scratch, "model.scratch").tokenizer(instantiate(run.data, "data").texts("train")))
    assert 10 < words < 10_000
    block = 12 * 96**2 + 13 * 96  # attention 4 H^2 + 4 H, MLP 8 H^2 + 5 H, two norms 4 H
    own = (words + 64) * 96 + 3 * block + 2 * 96
    base = estimate_of(run).weights["base (is the reference)"]
    assert base == 4 * own  # bytes


def test_the_table_has_a_row_for_every_role_and_phase_and_names_the_peak() -> None:
    found = MemoryEstimate(
        {"base": 3 * MIB, "policy": MIB}, {"policy": MIB // 2}, {"policy": 2 * MIB}, {"rollout": 4 * MIB, SAVING: MIB}
    )
    console = Console(width=100, file=io.StringIO())
    console.print(memory_table(found))
    text = console.file.getvalue()
    assert "at most 10.0 MiB" in text  # 4 of weights, 2 of Adam, 4 passing
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert ["1.0 MiB" in rows["policy"], "0.5 MiB" in rows["policy"], "2.0 MiB" in rows["policy"]] == [True] * 3
    assert "4.0 MiB" in rows["rollout"]
    assert SAVING in rows


def test_sizes_are_read_in_the_unit_that_suits_them() -> None:
    assert [readable(size) for size in (0, 5 * MIB // 2, 2**30, 3 * 2**29)] == [
        "0.0 MiB", "2.5 MiB", "1.0 GiB", "1.5 GiB",
    ]  # fmt: skip


def test_weights_are_counted_without_memory() -> None:
    assert weights_of(GPT2Config()) == 124_439_808
    tiny = gpt2_config()
    blocks = 2 * (12 * 16**2 + 13 * 16)
    assert weights_of(tiny) == blocks + (tiny.vocab_size + tiny.n_positions) * 16 + 2 * 16
