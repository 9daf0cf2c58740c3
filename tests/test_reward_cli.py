"""Every reward as a person chooses it on the command line, in runs of one iteration of a tiny model."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.data.embedded.reviews import Reviews
from src.rewards.vader import Vader
from src.runs.start import start as run
from src.serve_reward import build_app
from src.utils.exits import JobFailedError, friendly_errors
from tests.servers import serving
from tests.tiny import FOREIGN_WARNINGS

pytestmark = [
    *FOREIGN_WARNINGS,
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),  # Lightning, of very short runs
]

ROOT = Path(__file__).parents[1]
CORPUS = ["data.n_reviews=240", "data.n_pairs=20"]
FAST = ["trainer.accelerator=cpu", "model=tiny"]
TINY = [
    *FAST,
    *("ppo.num_iterations=1", "ppo.batch_size=8", "ppo.minibatch_size=8", "ppo.micro_batch_size=8", "ppo.epochs=1"),
    *("ppo.eval_prompts=8", "rollout.max_new_tokens=12"),
]
MODULE = '''
calls = []

def brevity(prompts, responses, metadata):
    """Short responses are good; an ended one is better."""
    return [float(row["finished"]) - len(text.split()) / 10 for text, row in zip(responses, metadata)]

def broken(prompts, responses, metadata):
    return [1 / 0 for _ in responses]

def nan_once(prompts, responses, metadata):
    calls.append(len(responses))
    return [float("nan") if len(calls) == 2 and row in (2, 5) else 0.5 for row in range(len(responses))]

def sometimes(prompts, responses, metadata):
    """Nothing to say of texts with an odd number of letters."""
    return [float("nan") if len(p + r) % 2 else len(r) / 10 for p, r in zip(prompts, responses)]
'''


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model of the reviews, hardly trained."""
    folder = tmp_path_factory.mktemp("sft")
    sizes = ["sft.steps=5", "sft.batch_size=8", "sft.eval_rows=8", "sft.max_tokens=24", "trainer.accelerator=cpu"]
    run(["stage=sft", "experiment=none", "model=tiny", *CORPUS, *sizes, "name=sft", f"log_dir={folder}"])
    return str(folder / "sft/sft/model")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same reviews as a file whose rows have answers."""
    texts = Reviews(Vader(), n_reviews=240, n_pairs=20).texts("train")
    rows = [{"text": text, "rating": i % 5, "answer": f"so {i}\n#### {i}"} for i, text in enumerate(texts)]
    file = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the user's own, from which it can be imported."""
    (tmp_path / "my_rewards_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards_of_a_test", raising=False)
    return tmp_path


def overrides(sft: str, tmp_path: Path, *others: str) -> list[str]:
    return ["experiment=none", *TINY, f"model.path={sft}", f"log_dir={tmp_path}/logs", "name=run", *others]


def samples_of(tmp_path: Path) -> list[dict[str, Any]]:
    """What the run's first iteration wrote."""
    file = tmp_path / "logs/ppo/run/samples/iteration-000001.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def train(sft: str, tmp_path: Path, *others: str) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, Any]]:
    """Samples of the first iteration, its row of metrics.csv, and result.json."""
    result = run(overrides(sft, tmp_path, *others))
    samples = samples_of(tmp_path)
    with (tmp_path / "logs/ppo/run/metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    numbers = {name: float(value) for name, value in row.items() if value}
    assert numbers["rollout/score"] == pytest.approx(sum(s["score"] for s in samples) / len(samples), abs=1e-5)
    return samples, numbers, result


def refusal(sft: str, tmp_path: Path, *others: str) -> str:
    """The one sentence that these overrides are refused with."""
    given = overrides(sft, tmp_path, *others)
    with pytest.raises(JobFailedError) as stopped, friendly_errors(given, job_of_sweep=True):
        run(given)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def whole(row: dict[str, Any]) -> float:
    return float(Vader().score([row["prompt"]], [row["response"]], [{}])[0])


def length(row: dict[str, Any]) -> float:
    return -abs(len(row["response"].split()) - 12) / 12


RULES: dict[str, tuple[list[str], Callable[[dict[str, Any]], float]]] = {
    "vader": (["reward=vader"], whole),
    "keyword": (
        ["reward=keyword", "reward.keywords=[the,a,was,film]"],
        lambda row: sum(w in re.findall(r"\w+", row["response"].lower()) for w in ("the", "a", "was", "film")) / 4,
    ),
    "length": (["reward=length"], length),
    "regex": (
        ["reward=regex", r"reward.pattern='\b[aeiou]\w+'", "reward.else_score=-2"],
        lambda row: 1.0 if any(w[0] in "aeiou" for w in re.findall(r"\w\w+", row["response"])) else -2.0,
    ),
    "mix": (["reward=mix"], lambda row: (whole(row) + 0.2 * length(row)) / 1.2),
    "mix changed": (
        ["reward=mix", "reward.parts.length.target_words=12", "reward.weights.length=-3", "reward.weights.sentiment=1"],
        lambda row: (whole(row) - 3 * length(row)) / 4,
    ),
}


@pytest.mark.parametrize("reward", RULES)
def test_a_rule_trains(reward: str, sft: str, tmp_path: Path) -> None:
    """Each sample has the score that is worked out here from its text, and the parts of a mix have their columns."""
    given, expected = RULES[reward]
    samples, numbers, result = train(sft, tmp_path, *CORPUS, *given)
    assert len(samples) == 8
    assert [row["score"] for row in samples] == pytest.approx([expected(row) for row in samples], abs=1e-5)
    assert len({row["score"] for row in samples}) > 1
    assert result["ppo"]["n"]["score"] == 8
    parts = {"rollout/score_sentiment": whole, "rollout/score_length": length} if reward.startswith("mix") else {}
    for name, part in parts.items():
        assert numbers[name] == pytest.approx(sum(map(part, samples)) / 8, abs=1e-5)
    assert {name for name in numbers if name.startswith("rollout/score_")} == {"rollout/score_std", *parts}
    assert numbers["rollout/dropped"] == 0


@pytest.mark.parametrize("reward", ["exact_match", "numeric"])
def test_a_verifier_trains_on_data_that_has_answers(reward: str, sft: str, table: str, tmp_path: Path) -> None:
    """The column reaches it; no response of this model is an answer. A column that is not there is named."""
    data = ["data=movie_reviews", f"data.path={table}", f"reward={reward}"]
    samples, _, result = train(sft, tmp_path, *data)
    assert [row["score"] for row in samples] == [0.0] * 8
    assert (result["sft"]["score"], result["ppo"]["n"]["score"]) == (0.0, 8)
    said = refusal(sft, tmp_path, *data, "reward.answer_column=gold")
    assert said == "the data has no column 'gold', only answer, finished, rating"


def test_an_exact_match_is_worth_one(sft: str, table: str, tmp_path: Path) -> None:
    """The answers of some prompts are made those that the same seed gives, which a first run tells."""
    data = ["data=movie_reviews", "reward.answer_column=answer"]
    told, _, _ = train(sft, tmp_path / "first", "data=movie_reviews", f"data.path={table}", "reward=length")
    answers = {row["prompt"]: f"{row['response']} \n" for row in told[:4]}
    rows = [json.loads(line) for line in Path(table).read_text().splitlines()]
    for row in rows:
        row["answer"] = answers.get(" ".join(row["text"].split()[:4]), "no such answer")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, _, _ = train(sft, tmp_path, "reward=exact_match", *data, f"data.path={tmp_path}/answers.jsonl")
    assert [row["response"] for row in samples] == [row["response"] for row in told]
    expected = [float(row["response"].strip() == answers.get(row["prompt"], "").strip()) for row in told]
    assert [row["score"] for row in samples] == expected
    assert 0 < sum(expected) < 8


@pytest.mark.slow
def test_over_http_the_log_is_that_of_the_same_reward_in_process(sft: str, tmp_path: Path) -> None:
    near = train(sft, tmp_path / "near", *CORPUS, "reward=vader")
    with serving(build_app(Vader(), "answer", "", 10**6)) as url:
        far = train(sft, tmp_path / "far", *CORPUS, "reward=http", f"reward.url={url}", "reward.batch_size=3")
    assert near[0] == far[0]
    assert far[1].pop("rollout/score_scores") == pytest.approx(far[1]["rollout/score"], abs=1e-6)  # the server's scores
    assert near[1] == far[1]
    assert near[2]["ppo"] == far[2]["ppo"]


# ----------------------------------------------------------------------------------------- functions of the user's own


def test_a_function_of_one_s_own_trains(mine: Path, sft: str) -> None:
    """It reads the response and whether it ended."""
    samples, _, _ = train(sft, mine, *CORPUS, "reward=function", "reward.target=my_rewards_of_a_test.brevity")
    expected = [float(row["finished"]) - len(row["response"].split()) / 10 for row in samples]
    assert [row["score"] for row in samples] == pytest.approx(expected, abs=1e-6)


def test_a_function_that_raises_stops_the_run_in_one_sentence(mine: Path, sft: str) -> None:
    said = refusal(sft, mine, *CORPUS, "reward=function", "reward.target=my_rewards_of_a_test.broken")
    assert said.startswith(
        "reward my_rewards_of_a_test.broken raised ZeroDivisionError('division by zero') for prompt "
    )


def test_drop_failed_leaves_out_what_has_no_score(mine: Path, sft: str) -> None:
    """Two samples of the only iteration; without it the same function stops the run. The first call is the trial."""
    given = [*CORPUS, "reward=function", "reward.target=my_rewards_of_a_test.nan_once"]
    samples, numbers, _ = train(sft, mine, *given, "ppo.drop_failed=true")
    assert [row["score"] for row in samples] == [0.5] * 6
    assert numbers["rollout/dropped"] == 2
    sys.modules["my_rewards_of_a_test"].calls.clear()
    assert "my_rewards_of_a_test.nan_once gave nan for prompt" in refusal(sft, mine, *given)


def test_drop_failed_holds_for_the_final_comparison_and_the_gold_score_too(mine: Path, sft: str) -> None:
    """The run ends with its result, which says how many of the eight prompts were judged in both roles."""
    reward = ["reward=function", "reward.target=my_rewards_of_a_test.sometimes"]
    gold = ["gold_reward=taste", "gold_reward.parts.grammar.target=my_rewards_of_a_test.sometimes"]
    samples, numbers, result = train(sft, mine, *CORPUS, *reward, *gold, "ppo.drop_failed=true")
    assert 0 < len(samples) == 8 - numbers["rollout/dropped"] < 8
    assert math.isfinite(numbers["rollout/gold"])
    n = result["ppo"]["n"]
    assert 0 < n["score"] == n["gold"] == result["sft"]["n"]["score"] == result["improvement"]["n"]["score"] < 8
    assert n["kl"] == 8


@pytest.mark.slow
def test_a_file_in_the_working_directory_is_found(mine: Path, sft: str) -> None:
    """`python -m` puts the working directory first among the places that modules come from."""
    given = [*overrides(sft, mine, *CORPUS), "reward=function", "reward.target=my_rewards_of_a_test.brevity"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "src.train", *given]
    done = subprocess.run(command, cwd=mine, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    samples = samples_of(mine)
    expected = [float(row["finished"]) - len(row["response"].split()) / 10 for row in samples]
    assert [row["score"] for row in samples] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "shutil.rmtree"])
def test_functions_that_reach_out_of_the_run_are_refused(target: str, sft: str, tmp_path: Path) -> None:
    """By Hydra; nothing is called."""
    said = refusal(sft, tmp_path, *CORPUS, "reward=function", f"reward.target={target}")
    assert said.startswith(f"reward.target: Target '{target}' is blocklisted")


@pytest.mark.parametrize(("target", "what"), [("math.pi", "value"), ("math", "module")])
def test_what_cannot_be_called_is_no_reward(target: str, what: str, sft: str, tmp_path: Path) -> None:
    said = refusal(sft, tmp_path, *CORPUS, "reward=function", f"reward.target={target}")
    assert said.startswith(f"reward.target={target}: is a {what}, not a function")


@pytest.mark.parametrize(("target", "named"), [("no_such_module.brevity", "no_such_module"), ("math.brevity",) * 2])
def test_a_function_that_is_not_there_is_named(target: str, named: str, sft: str, tmp_path: Path) -> None:
    assert named in refusal(sft, tmp_path, *CORPUS, "reward=function", f"reward.target={target}")


# -------------------------------------------------------------------------------------------- settings that cannot work

REFUSED = {
    "reward=function": "reward.target must be given with these choices: add reward.target=...",
    "reward=keyword": "reward.keywords must be given with these choices: add reward.keywords=...",
    "reward=regex": "reward.pattern must be given with these choices: add reward.pattern=...",
    "reward=http": "reward.url must be given with these choices: add reward.url=...",
    "reward=keyword reward.keywords=good": "reward.keywords='good': must be a list",
    "reward=keyword reward.keywords=[]": "reward.keywords=[]: must be a list of at least one word",
    "reward=regex reward.pattern='('": "reward.pattern='(': must be a regular expression of Python's re "
    "(missing ), unterminated subpattern at position 0)",
    "reward=length reward.target_words=0": "reward.target_words=0: must be at least 1",
    "reward=numeric reward.tolerance=-1": "reward.tolerance=-1: must be at least 0",
    "reward=http reward.url=localhost": "reward.url='localhost': must be an address that starts with http:// or https://",
    "reward=mix reward.weights={sentiment:0,length:0}": "reward.weights={'sentiment': 0.0, 'length': 0.0}: "
    "must be numbers of which one is not 0",
    "reward=mix +reward.weights.extra=1": "reward.weights={'sentiment': 1.0, 'length': 0.2, 'extra': 1.0}: "
    "must be one number for each of sentiment, length",
    "reward=vader ppo.reward_timeout=0": "ppo.reward_timeout=0: must be greater than 0, or null",
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_setting_of_a_reward_that_cannot_work_is_named(given: str, sft: str, tmp_path: Path) -> None:
    assert refusal(sft, tmp_path, *CORPUS, *given.split()) == REFUSED[given]
