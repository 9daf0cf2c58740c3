"""A run that is unfinished, of an older format or half copied gives a page of what is there, and says what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.report.page import PAGE, write_page
from src.report.read import read_run, stage_folders
from tests.report.runs import write_run

PIECES = {
    "config": "config.yaml", "metrics": "metrics.csv", "timing": "timing.csv", "result": "result.json",
    "comparison": "comparison.jsonl", "samples": "samples/iteration-000001.jsonl",
}  # fmt: skip
FILES = tuple(PIECES.values())
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) * 2 // 3 + 1].rstrip(),
    "bytes": lambda content: b"\xff\xfe\x00{",
    "gone": None,
}


def damaged(folder: Path, name: str, damage: str) -> Path:
    path, change = folder / name, DAMAGES[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    return folder


def test_a_whole_run_misses_nothing(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.missing == []
    assert (run.finished, run.steps, run.stage) == (True, (40, 50), "ppo")
    assert [row["iteration"] for row in run.samples] == [1, 1, 1, 40, 40, 40]
    assert run.metrics[1].keys() >= {"rollout/score"}
    assert "step" not in run.metrics[1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_named_and_the_rest_is_read(name, damage, tmp_path):
    whole, run = read_run(write_run(tmp_path / "whole")), read_run(damaged(write_run(tmp_path / "run"), name, damage))
    if (name, damage) == ("result.json", "gone"):
        assert run.missing == [
            "there is no result: the run trains, was interrupted or failed; the same command resumes it"
        ]
    elif (damage, name[:7]) != ("gone", "samples"):
        assert any(Path(name).name in sentence for sentence in run.missing), run.missing
    for piece, file in PIECES.items():
        assert name == file or getattr(run, piece) == getattr(whole, piece), piece


def test_a_page_is_made_of_nothing_but_damaged_files(tmp_path):
    for damage in DAMAGES:
        folder = write_run(tmp_path / damage)
        for name in FILES if damage != "gone" else FILES[2:]:
            damaged(folder, name, damage)
        assert "What is not in this report" in write_page(folder).read_text(encoding="utf-8")


def test_a_run_that_trains_shows_how_far_it_is(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    text = write_page(folder).read_text(encoding="utf-8")
    assert "not finished, 40 of 50 iterations" in text
    assert "the same command resumes it" in text
    assert "First row, and the mean of the last tenth" in text


def test_a_result_of_another_format_is_left_out_and_said(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "result.json").write_text(json.dumps({"format": 1, "ppo": {"score": 3.0}}))
    run = read_run(folder)
    assert run.result == {}
    assert "result.json has format 1, not 2: it is left out" in run.missing


def test_an_older_run_has_samples_without_numbers_of_tokens(tmp_path):
    old = [{"iteration": 1, "prompt": "A", "response": " film", "score": 1.0, "finished": True}]
    assert "tokens of the response" in write_page(write_run(tmp_path / "run", samples=old)).read_text(encoding="utf-8")


def test_settings_of_a_wrong_kind_do_not_end_the_page(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("stage: ppo\nppo: 3\nseed: [1]\n")
    assert read_run(write_page(folder).parent).steps == (40, None)


def test_a_pipeline_is_its_stages_the_last_one_first(tmp_path):
    for stage in ("sft", "ppo"):
        write_run(tmp_path / "all" / stage)
    assert [folder.name for folder in stage_folders(tmp_path / "all")] == ["ppo", "sft"]
    assert write_page(tmp_path / "all") == tmp_path / "all" / PAGE


def test_the_models_of_a_run_lead_to_the_runs_that_made_them(tmp_path):
    reward, sft = write_run(tmp_path / "reward"), write_run(tmp_path / "sft")
    (sft / "model").mkdir()
    run = write_run(tmp_path / "run", f"reward.path={reward}", f"model.path={sft / 'model'}")
    assert stage_folders(run) == [run, reward, sft]


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        stage_folders(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no run lies there"):
        stage_folders(tmp_path)


def test_a_line_is_a_sample_whatever_is_in_its_text(tmp_path):
    """Characters at which Python splits lines and JSON does not."""
    odd = [{"iteration": 1, "prompt": "A", "response": "a\u2028b\u2029c\u0085d", "score": 1.0, "finished": True}]
    folder = write_run(tmp_path / "run", samples=odd)
    assert odd[0]["response"] in (folder / PIECES["samples"]).read_text(encoding="utf-8")
    assert (read_run(folder).samples, read_run(folder).missing) == (odd, [])


def test_what_is_of_another_shape_is_left_out_and_the_page_is_made(tmp_path):
    folder = write_run(tmp_path / "run")
    good = (folder / "comparison.jsonl").read_text(encoding="utf-8")
    bad = [
        {"prompt": "p", "sft": "text", "ppo": {"response": "b"}},
        {"sft": {"response": "a"}, "ppo": {"response": "b"}},
    ]
    (folder / "comparison.jsonl").write_text(good + "".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
    result = json.loads((folder / "result.json").read_text())
    result["ppo"]["interval"] = {name: [None, None] for name in result["ppo"]["interval"]}
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    (folder / "config.yaml").write_text("stage: ppo\nmodel: x\nreward: 3\n")
    run = read_run(folder)
    assert len(run.comparison) == good.count("\n")
    assert run.missing == ["comparison.jsonl: 2 lines without a prompt and two answers are left out"]
    assert stage_folders(folder) == [folder]
    assert run.missing[0] in write_page(folder).read_text(encoding="utf-8")
