"""Several runs on one page: settings that differ, intervals over seeds and over prompts, names."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from src.report.compare import (
    T_975,
    Compared,
    differing,
    mean_with_interval,
    over_seeds,
    paired,
    write_comparison,
)  # fmt: skip
from src.report.read import read_run
from src.report.settings import ABSENT
from src.utils.statistics import Figure, bootstrap_mean
from tests.report.runs import answers, result, write_run


def t_below(x: float, degrees: int) -> float:
    """P(T < x) of Student's t: 1/2 and the trapezoids of its density from 0 to x."""
    grid = np.linspace(0, x, 200_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    return 0.5 + float(np.trapezoid(scale * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2), grid))


@pytest.mark.parametrize("degrees", [1, 2, 5, 14, 30])
def test_the_quantiles_are_students(degrees):
    assert t_below(T_975[degrees - 1], degrees) == pytest.approx(0.975, abs=2e-5)


def test_the_interval_over_seeds_is_by_hand_that_of_student():
    """Of 1, 2, 4: mean 7/3, s = sqrt(7/3), n = 3."""
    figure = mean_with_interval([1.0, 2.0, 4.0])
    half = 4.303 * math.sqrt(7 / 3) / math.sqrt(3)
    assert (figure.value, figure.n) == (pytest.approx(7 / 3), 3)
    assert figure.interval == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_settings_that_differ_are_listed_for_every_run():
    configs = [{"seed": 1, "ppo": {"clip": 0.1, "a": 1}}, {"seed": 1, "ppo": {"clip": 0.2, "a": 1, "b": 2}}]
    assert differing(configs) == {"ppo.clip": ["0.1", "0.2"], "ppo.b": [ABSENT, "2"]}


def test_of_keys_with_the_same_values_the_one_that_was_given_is_listed():
    """`ppo.clip` sets `ppo.a_low` too."""
    configs = [{"overrides": [f"ppo.clip={x}"], "ppo": {"a_low": x, "clip": x, "b": -x}} for x in (0.1, 0.2)]
    assert differing(configs) == {"ppo.clip": ["0.1", "0.2"], "ppo.b": ["-0.1", "-0.2"]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two seeds of one setting, and a third run that failed on the way."""
    folder = tmp_path_factory.mktemp("compare")
    better = answers(9)
    for row in better:
        row["ppo"]["score"] += 0.25
    runs = [
        write_run(folder / "clip-0.1_seed-1", "ppo.clip=0.1"),
        write_run(folder / "clip-0.1_seed-2", "ppo.clip=0.1", "seed=2", comparison=better, result=result(score=2.5)),
        write_run(folder / "clip-0.4_seed-1", "ppo.clip=0.4", iterations=7, finished=False),
    ]
    written = write_comparison(runs, failed={"ppo.clip=0.5": "the reward could score none of the answers"})
    assert written == folder / "comparison.html"
    return written.read_text(encoding="utf-8")


def test_the_table_has_what_differs_and_what_came_of_it(page):
    score = "2.000<br><small>1.900 to 2.100</small>"
    for cell in ("clip-0.1_seed-1", "clip-0.4_seed-1", "not finished, 7 of 50", score):
        assert cell in page, cell
    header = page.split("<thead>")[1].split("</thead>")[0]
    assert header.startswith("<tr><th>run</th><th>ppo.clip</th><th>seed</th><th>state</th>")  # no ppo.clip_low
    assert page.index("ppo.clip=0.5") < page.index("Results")


def test_runs_that_differ_in_their_seed_alone_have_a_mean_over_them(page):
    """2.0 and 2.5: 2.25 +- 12.706 * 0.3536 / sqrt(2)."""
    half = 12.706 * math.sqrt(0.125) / math.sqrt(2)
    seeds = page.split('id="seeds"')[1].split("</section>")[0]
    assert f"2.250<br><small>{2.25 - half:.3f} to {2.25 + half:.3f}</small>" in seeds
    assert "clip-0.4" not in seeds


def compared(folder, *overrides, seed=1, **settings):
    found = result(score=2.0 + seed)
    run = read_run(write_run(folder, *overrides, f"seed={seed}", result=found))
    config = {**run.config, "overrides": list(overrides), "seed": seed, **settings}
    return Compared(folder.name, replace(run, config=config), {"score": Figure(found["ppo"]["score"], 8, None)}, ())


def test_a_seed_counts_once_and_a_path_that_was_given_is_a_setting(tmp_path):
    """Paths that stages hand on differ between seeds; those of a command say which model or data it was."""
    handed = [compared(tmp_path / f"a{s}", seed=s, model={"path": f"sft-{s}"}) for s in (1, 2)]
    again = compared(tmp_path / "again", seed=2, model={"path": "sft-2"})
    ((names, means),) = over_seeds([*handed, again])
    assert names == ["a1", "a2"]
    assert (means["score"].value, means["score"].n) == (3.5, 2)
    given = [compared(tmp_path / f"b{s}", f"model.path=lm-{s}", seed=s, model={"path": f"lm-{s}"}) for s in (1, 2)]
    assert over_seeds(given) == []
    assert over_seeds([handed[1], again]) == []


def test_answers_to_one_prompt_are_resampled_together(tmp_path):
    """The gain is that of the prompt, +1 or -1: four answers say no more than one."""
    first, other = answers(32), answers(32)
    for number, (a, b) in enumerate(zip(first, other, strict=True)):
        a["prompt"] = b["prompt"] = f"prompt {number // 4}"
        a["ppo"]["score"], b["ppo"]["score"] = 0.0, 1.0 if number // 4 % 2 else -1.0
    runs = [read_run(write_run(tmp_path / n, comparison=rows)) for n, rows in (("a", first), ("b", other))]
    score, *_ = paired(*(Compared(run.folder.name, run, {}, ()) for run in runs))
    gains = [1.0, -1.0] * 4
    assert score.difference.interval == bootstrap_mean(gains).interval


def test_the_same_prompts_are_compared_one_by_one(page):
    """Each is 0.25 higher, so the interval has no width, though the means' own are wide."""
    paired = page.split('id="paired"')[1].split("</section>")[0]
    assert "+0.250<br><small>+0.250 to +0.250</small>" in paired
    assert "clip-0.4" not in paired


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [write_run(tmp_path / parent / "run", iterations=3) for parent in ("a", "b")]
    text = write_comparison(runs).read_text(encoding="utf-8")
    assert "<bdi>a/run</bdi>" in text
    assert "<bdi>b/run</bdi>" in text
