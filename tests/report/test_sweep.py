"""The end of a sweep: its folder, how each job ended, and the table."""

from __future__ import annotations

import json

import pytest

from src.report.sweep import begin, compare_jobs, recorded, sweep_folder, swept_in
from src.runs.folder import name_in_sweep, name_of
from tests.report.runs import result, write_run


def test_a_sweep_has_a_readable_folder_the_same_when_it_is_given_again():
    folder = sweep_folder(["ppo.clip=0.1,0.2", "model.path=a/b", "seed=1,2", "log_dir=x"])
    assert folder.parent.as_posix() == "x/sweeps"
    assert folder.name.startswith("ppo.clip-0.1-0.2_seed-1-2-")
    assert folder == sweep_folder(["seed=1,2", "log_dir=x", "ppo.clip=0.1,0.2", "model.path=a/b"])
    assert sweep_folder(["seed=1,2"]) != sweep_folder(["seed=1,2", "model.path=a/b"])
    assert sweep_folder(["seed=1,2", "hydra.sweep.dir='mine/here'"]).as_posix() == "mine/here"


def test_a_job_with_many_overrides_is_named_after_what_the_jobs_differ_in():
    long = [f"ppo.a_setting_with_a_long_name_{i}={i}" for i in range(4)]
    jobs = [[*long, f"ppo.clip={clip}", "seed=1"] for clip in (0.1, 0.2)]
    names = [name_in_sweep(job, ["ppo.clip"]) for job in jobs]
    assert [name[:12] for name in names] == ["ppo.clip-0.1", "ppo.clip-0.2"]
    assert names[0] != name_in_sweep([*jobs[0], "seed=2"], ["ppo.clip"])
    assert name_in_sweep(["ppo.clip=0.1", "seed=1"], ["ppo.clip"]) is None
    assert name_in_sweep(jobs[0], []) is None
    assert len(name_of(jobs[0])) == 80


def test_keys_with_several_values_are_noted_for_other_processes(tmp_path):
    assert swept_in(str(tmp_path)) == []
    begin(tmp_path / "sweep", ["ppo.clip", "seed"])
    assert swept_in(str(tmp_path / "sweep")) == ["ppo.clip", "seed"]


def test_the_table_has_every_job_and_the_reason_of_one_that_failed(tmp_path, capsys):
    sweep, old = tmp_path / "sweep", tmp_path / "old"
    with recorded(str(old), ["ppo.clip=0.9"]) as job:
        job.folder = str(tmp_path / "nowhere")
    started = begin(sweep, ["ppo.clip"])
    for clip, score in ((0.1, 2.0), (0.2, 2.5)):
        with recorded(str(sweep), [f"ppo.clip={clip}", "seed=3"]) as job:
            folder = write_run(tmp_path / f"clip-{clip}", f"ppo.clip={clip}", result=result(score), iterations=3)
            job.folder = str(folder)
    with pytest.raises(RuntimeError), recorded(str(sweep), ["ppo.clip=0.3", "seed=3"]):
        raise RuntimeError("the reward could\nscore none of the answers")
    compare_jobs(sweep, started)
    out = capsys.readouterr().out
    for text in (
        "3 jobs",
        "ppo.clip=0.1",
        "2.500",
        "2.400 to 2.600",
        "failed: ppo.clip=0.3",
        "the reward could score none",
    ):
        assert text in out, text
    assert "seed=3" not in out
    page = (sweep / "comparison.html").read_text(encoding="utf-8")
    assert "<code>ppo.clip=0.3</code>: the reward could score none of the answers" in page
    assert len(list((sweep / "jobs").glob("*.json"))) == 3


def test_a_job_that_is_interrupted_is_recorded(tmp_path):
    with pytest.raises(KeyboardInterrupt), recorded(str(tmp_path), ["seed=1"]):
        raise KeyboardInterrupt
    (path,) = (tmp_path / "jobs").glob("*.json")
    assert json.loads(path.read_text())["error"] == "KeyboardInterrupt"


def test_jobs_of_an_earlier_start_are_not_in_the_table(tmp_path, capsys):
    with recorded(str(tmp_path), ["seed=1"]):
        pass
    compare_jobs(tmp_path, begin(tmp_path, []) + 60)
    assert capsys.readouterr().out == ""
