"""`python -m src.evaluate`: its figures against direct computations and against the run's own final comparison."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from src.config.compose import compose
from src.errors import DataError
from src.evaluate import __main__ as command
from src.evaluate.__main__ import evaluate
from src.evaluate.prompt_file import read_prompts
from src.evaluate.prompts import own_column, writer_of
from src.runs.find import RunFolder, load_config, settings_of
from src.stages.builders import stage_of
from src.utils.text_metrics import distinct_ngrams, repetition
from tests.tiny import FOREIGN_WARNINGS, PROMPTS, write_lm

pytestmark = FOREIGN_WARNINGS


def write_prompts(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(folder):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads((folder / "result.json").read_text()), rows


def bootstrap(values, prompts):
    """Mean and 95% percentile interval over distinct prompts, each as often as the others, from our own resamples."""
    own = {prompt: [v for v, p in zip(values, prompts, strict=True) if p == prompt] for prompt in prompts}
    values, draws = np.array([np.mean(each) for each in own.values()]), np.random.default_rng(12345)
    means = [values[draws.integers(len(values), size=len(values))].mean() for _ in range(20000)]
    return values.mean(), np.percentile(means, [2.5, 97.5])


@pytest.fixture(scope="module")
def answered(tiny_run, tmp_path_factory):
    """The policy and the reference of the tiny run on 24 prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    prompts = write_prompts(folder / "prompts.jsonl", [{"prompt": p, "row": i} for i, p in enumerate(PROMPTS * 3)])
    return read(evaluate(str(tiny_run[0]), [f"prompts={prompts}", f"out={folder}/out"]))


def test_win_rate_and_its_interval_agree_with_a_direct_computation(answered):
    result, rows = answered
    scores = {role: [row["score"] for row in rows if row["role"] == role] for role in ("reference", "policy")}
    wins = [1.0 if p > r else 0.5 if p == r else 0.0 for r, p in zip(*scores.values(), strict=True)]
    assert {0.5} < set(wins)  # ties and others
    value, interval = bootstrap(wins, [row["prompt"] for row in rows if row["role"] == "policy"])
    assert result["win_rate"]["score"] == pytest.approx(value)
    assert result["win_rate"]["n"]["score"] == 24
    assert result["win_rate"]["interval"]["score"] == pytest.approx(interval, abs=0.03)  # 2000 resamples, other draws


def test_scores_are_vaders_and_kl_is_the_log_ratio_of_the_responses(answered, tiny_run):
    result, rows = answered
    analyzer = SentimentIntensityAnalyzer()
    policy, reference = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (tiny_run[0] / "model", tiny_run[1]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_run[1])
    mine = [row for row in rows if row["role"] == "policy"]
    for row in mine:
        text = row["prompt"] + row["response"]
        assert row["score"] == pytest.approx(analyzer.polarity_scores(text)["compound"])
    ended = [row for row in mine if row["eos_fraction"] == 1][:6]
    assert ended
    for row in ended:
        start = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["response"])["input_ids"] + [tokenizer.eos_token_id]
        if (
            len(whole) - len(start) != row["response_length"]
        ):  # special tokens were sampled: the text does not say which
            continue
        ids, logprobs = torch.tensor([whole]), []
        for model in (policy, reference):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0] / 0.9  # rollout.temperature
            taken = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(start) - 1 :]
            logprobs.append(taken.sum().item())
        assert row["kl"] == pytest.approx(logprobs[0] - logprobs[1], abs=1e-4)
    assert result["policy"]["kl"] == pytest.approx(np.mean([row["kl"] for row in mine]))


def test_it_repeats_the_runs_own_final_comparison(tiny_run, tmp_path):
    """The same prompts, formulas and random streams: the numbers of result.json come out again."""
    config = load_config(tiny_run[0] / "config.yaml")
    rows = stage_of(config).corpus().prompts("test")[:6]
    prompts = write_prompts(tmp_path / "test.jsonl", [{"prompt": row.prompt, **row.metadata} for row in rows])
    result, _ = read(evaluate(str(tiny_run[0]), [f"prompts={prompts}", f"out={tmp_path}/out"]))
    own = json.loads((tiny_run[0] / "result.json").read_text())
    for mine, theirs in (("reference", "sft"), ("policy", "ppo")):
        for name in ("score", "gold", "greedy_score", "kl", "response_length", "eos_fraction"):
            assert result[mine][name] == pytest.approx(own[theirs][name], abs=1e-5)
            assert result[mine]["interval"][name] == pytest.approx(own[theirs]["interval"][name], abs=1e-5)
    assert result["improvement"]["score"] == pytest.approx(own["improvement"]["score"], abs=1e-5)


def test_given_answers_are_scored_without_a_model(tiny_run, tmp_path):
    rows = [
        {"prompt": "the film", "responses": [" was great .", " was bad ."]},
        {"prompt": "a", "responses": " dull film ."},
    ]
    prompts = write_prompts(tmp_path / "given.jsonl", rows)
    result, lines = read(evaluate(str(tiny_run[0]), [f"prompts={prompts}", f"out={tmp_path}/out"]))
    compound = lambda text: SentimentIntensityAnalyzer().polarity_scores(text)["compound"]  # noqa: E731
    scores = [compound(t) for t in ("the film was great .", "the film was bad .", "a dull film .")]
    assert [line["score"] for line in lines] == pytest.approx(scores)
    assert result["given"]["score"] == pytest.approx(((scores[0] + scores[1]) / 2 + scores[2]) / 2)
    assert result["given"]["n"] == {"score": 2, "gold": 2, "response_length": 2, "repetition": 2} | {
        "distinct_1": 3, "distinct_2": 3
    }  # fmt: skip
    words = AutoTokenizer.from_pretrained(tiny_run[1])
    lengths = [
        len(words(text)["input_ids"]) + 1 for text in (" was great .", " was bad .", " dull film .")
    ]  # and the end
    assert [line["response_length"] for line in lines] == lengths
    assert {"policy", "reference", "win_rate"}.isdisjoint(result)


def test_a_file_may_have_the_column_that_the_run_was_trained_on(tiny_run, tmp_path):
    """The answers are those to a column `prompt`, and rewards read the row as in training."""
    rows = [{"question": p, "answer": str(i)} for i, p in enumerate(PROMPTS)]
    own = write_prompts(tmp_path / "own.jsonl", rows)
    same = write_prompts(tmp_path / "same.jsonl", [{"prompt": row["question"]} for row in rows])
    config = compose(["data=custom", "data.path=x.jsonl", "data.columns.prompt=question"])
    assert own_column(config.data) == "question"
    assert [row.prompt for row in read_prompts(str(own), "question").rows] == PROMPTS
    assert [row.metadata for row in read_prompts(str(own), "question").rows] == rows
    settings = ["data=custom", "data.path=x.jsonl", "data.columns.prompt=question"]
    found = [
        read(evaluate(str(tiny_run[0]), [f"prompts={path}", f"out={tmp_path}/{path.stem}", *settings]))[1]
        for path in (own, same)
    ]
    assert found[0] == found[1]
    assert own_column(compose([]).data) == "prompt"


def test_a_runs_template_writes_the_prompts_of_the_files_columns(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ q | upper }} by {{ who }}:")
    data = compose(["data=custom", "data.path=x.jsonl", f"data.template={tmp_path}/t.jinja"]).data
    path = write_prompts(tmp_path / "p.jsonl", [{"q": "a?", "who": "Ann"}, {"q": "b?", "who": "Bob"}])
    found = read_prompts(str(path), own_column(data), writer_of(data, "no model", chats=False, saved_template=False))
    assert [row.prompt for row in found.rows] == ["A? by Ann:", "B? by Bob:"]
    assert found.rows[1].metadata == {"q": "b?", "who": "Bob"}
    assert writer_of(compose([]).data, "no model", chats=False, saved_template=True) is None


def test_prompts_that_lose_their_beginning_are_said(tiny_run, tmp_path, caplog):
    long = " ".join(["the film was good"] * 20)
    path = write_prompts(tmp_path / "p.jsonl", [{"prompt": "the film"}, {"prompt": long}])
    caplog.set_level("INFO", "src.data.lengths")
    evaluate(str(tiny_run[0]), [f"prompts={path}", f"out={tmp_path}/out"])
    assert [said for said in caplog.messages if said.startswith("1 of 2 prompts are longer than")]


def test_a_run_on_questions_writes_the_prompts_of_a_file_as_its_own(tmp_path):
    """`data=reasoning_gym` asks through the chat template; with data.chat=false a question is the prompt as it is."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>")
    task = ["data=reasoning_gym", "data.task=chain_sum", f"data.chat_template={tmp_path}/t.jinja"]
    path, lm = write_prompts(tmp_path / "p.jsonl", [{"prompt": "1 + 1?"}]), write_lm(tmp_path / "lm")
    for more, expected in (
        (["data.chat=true", "data.system=Be brief."], "<system>Be brief.<user>1 + 1?<answer>"),
        (["data.chat=false"], "1 + 1?"),
    ):
        data = compose([*task, *more]).data
        writer = writer_of(data, lm, chats=False, saved_template=False)
        assert [row.prompt for row in read_prompts(str(path), own_column(data), writer).rows] == [expected]


def test_a_file_with_neither_column_says_what_to_rename(tmp_path):
    path = write_prompts(tmp_path / "p.jsonl", [{"question": "a", "id": 1}])
    rename = "; rename the one with the prompts to prompt"
    with pytest.raises(DataError, match=rf"p.jsonl:1 has no column 'prompt', only \['id', 'question'\]{rename}$"):
        read_prompts(str(path), "q")
    path = write_prompts(tmp_path / "p.jsonl", [{"question": "a"}, {"prompt": "b"}, {"question": 3}])
    with pytest.raises(DataError, match=r"p.jsonl:2 has no column 'question', only \['prompt'\]$"):
        read_prompts(str(path), "question")
    path = write_prompts(tmp_path / "p.jsonl", [{"question": 3}])
    with pytest.raises(DataError, match=r"p.jsonl:1: column 'question' must be a text that is not empty, not 3"):
        read_prompts(str(path), "question")


def test_a_plain_folder_needs_a_reward_and_compares_with_a_reference_only_if_given(tiny_run, tmp_path):
    (tmp_path / "p.txt").write_text("the film\na bad\n", encoding="utf-8")
    sizes = ["rollout.max_prompt_tokens=8", "rollout.max_new_tokens=6", f"prompts={tmp_path}/p.txt", "reward=vader"]
    result, rows = read(evaluate(tiny_run[1], [*sizes, f"out={tmp_path}/alone"]))
    assert [row["prompt"] for row in rows] == ["the film", "a bad"]
    assert "kl" not in result["policy"]
    assert "win_rate" not in result
    result, _ = read(evaluate(tiny_run[1], [*sizes, f"reference={tiny_run[1]}", f"out={tmp_path}/two"]))
    assert result["policy"]["kl"] == 0
    assert result["win_rate"]["score"] == 0.5  # the same model twice: ties only


@pytest.mark.parametrize(
    ("text", "n", "expected"), [("a b c d e", 4, 0), ("a b a b a b", 2, 1 - 2 / 5), ("a b", 4, 0), ("", 4, 0), ("x x x x x x", 4, 1 - 1 / 3)]  # noqa: E501
)  # fmt: skip
def test_repetition_is_the_share_of_ngrams_seen_before(text, n, expected):
    assert repetition(text, n) == pytest.approx(expected)


def test_distinct_ngrams_are_counted_over_all_texts():
    assert distinct_ngrams(["a b", "a c", ""], 1) == 3 / 4
    assert distinct_ngrams(["a b", "a b"], 2) == 1 / 2
    assert distinct_ngrams(["", "a"], 2) == 0


def test_what_it_refuses(tiny_run, tmp_path, monkeypatch, capsys):
    run, base = tiny_run
    ok = write_prompts(tmp_path / "ok.jsonl", [{"prompt": "a"}])
    half = write_prompts(tmp_path / "half.jsonl", [{"prompt": "a", "responses": "b"}, {"prompt": "a"}])
    empty = write_prompts(tmp_path / "empty.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    (tmp_path / "latin.txt").write_bytes(b"na\xefve\n")
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("result.json", "model"))
    for arguments, sentence in {
        (run,): "prompts is missing: add prompts=FILE",
        (run, "prompts=/no/such.jsonl"): "there is no file /no/such.jsonl",
        (run, f"prompts={half}"): "half.jsonl:2: column 'responses' must be a text or a list of texts, not None",
        (run, f"prompts={empty}"): "empty.jsonl:2: column 'prompt' must be a text that is not empty, not ''",
        (run, f"prompts={tmp_path}/latin.txt"): "latin.txt:1 is not valid UTF-8: byte 3 of the line is 0xef",
        (run, f"prompts={ok}", "ppo.clipp=1"): "there is no key ppo.clipp",
        (run, f"prompts={ok}", f"out={tmp_path}"): "exists and is not empty",
        (base, f"prompts={ok}"): "add reward=vader, or reward=learned reward.path=FOLDER",
        (tmp_path / "young", f"prompts={ok}"): "the run is unfinished and has no model yet",
    }.items():
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        said = capsys.readouterr().err
        assert (stopped.value.code, said.count("\n")) == (2, 1), said
        assert sentence in said


def test_another_reward_than_the_runs_needs_nothing_of_the_runs_own() -> None:
    """A pipeline hands PPO reward.path, which no other reward reads; all else stays."""
    own = ["stage=ppo", "experiment=none", "reward.path='/some/where'", "model.path='/base'", "rollout.temperature=0.7"]
    saved = compose(own)
    config = settings_of(RunFolder(Path("somewhere"), saved), "somewhere", ["reward=keyword", "reward.keywords=[good]"])
    assert config.choices["reward"] == "keyword"
    assert (config.model.path, config.rollout.temperature) == ("/base", 0.7)
    assert settings_of(RunFolder(Path("somewhere"), saved), "somewhere", ["ppo.lam=0.5"]).reward.path == "/some/where"
