"""Every documented number is read back from what a run of each logger has stored, with its step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import src.loggers
from src.errors import ConfigError
from src.loggers import packages
from src.loggers.csv import write_table
from src.report.metrics import groups
from src.stages.builders import stage_of
from tests.config.composed import composed
from tests.wandb_files import wandb_records

NAMES = [metric.name.replace("NAME", "mine") for group in groups() for metric in group.metrics]
STEPS = (1, 2, 10)
Stored = dict[str, dict[int, float]]  # name -> step -> value


def numbers(step: int) -> dict[str, float]:
    return {name: step + 0.25 * place for place, name in enumerate(NAMES)}


def written() -> Stored:
    return {name: {step: numbers(step)[name] for step in STEPS} for name in NAMES}


def logged(option: str, folder: Path, *overrides: str) -> Any:
    """The logger of a run with `logger=OPTION` that has logged all there is to log."""
    stage = stage_of(composed(f"logger={option}", "name=mine", *overrides))
    (logger,) = [one for one in stage._loggers(folder) if type(one).__module__.startswith("src.loggers." + option)]
    logger.log_hyperparams({"ppo": {"lr": 0.5}})
    for step in STEPS:
        logger.log_metrics(numbers(step), step)
    logger.log_table("samples", columns=["iteration", "prompt"], data=[[1, "a | b"], [10, "c\nd"]])
    if hasattr(logger, "log_histograms"):
        logger.log_histograms({"samples/ratio": [0.9, 1.0, 1.1]}, 10)
    logger.alert("KL blow-up", "iteration 3: KL blow-up: 30 nats", 3)
    logger.log_figures({"ppo.score": 1.5})
    logger.finalize("success")
    getattr(logger.experiment, "finish", lambda: None)()
    return logger


def test_wandb_offline(tmp_path: Path) -> None:
    """Group and stage, axes, tables, histograms, alerts, the plot of all iterations, and the result to sort by."""
    folder = tmp_path / "ppo" / "ppo.clip-0.1_seed-3"
    before = {step: {"rollout/kl": 0.5 * step, "rollout/score": 1.0 * step} for step in (1, 2, 3)}
    write_table(folder / "metrics.csv", before)  # of a run that was resumed
    logged("wandb", folder, "logger.wandb.offline=true")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(60):  # wandb's own process writes the file, on a busy machine after `finish`
        found = read_wandb(file)
        if found.stored == written() and found.alerts and "ppo.score" in found.summary:
            break
        time.sleep(1)
    assert found.stored == written()
    assert found.run == ("mine", "ppo.clip-0.1", "ppo")
    axes = {"rollout": "train/episodes", "held_out": "train/episodes"}
    axes |= dict.fromkeys(("policy", "critic", "time"), "train/iterations")
    of_groups = {name: axes[name.split("/")[0]] for name in NAMES if name.split("/")[0] in axes}
    assert {name: axis for name, axis in found.axes.items() if name in NAMES} == of_groups
    assert found.kinds["samples"] == found.kinds["reward against KL_table"] == "table-file"
    assert found.kinds["samples/ratio"] == "histogram"
    assert found.summary["ppo.score"] == "1.5"
    assert found.alerts == ["KL blow-up"]
    (plot,) = folder.glob("wandb/offline-run-*/files/media/table/reward against KL_table*.json")
    assert json.loads(plot.read_text())["data"] == [[0.5, 1.0], [1.0, 2.0], [1.5, 3.0]]
    assert "scatter" in found.config["_wandb/visualize/reward against KL"]


@dataclass
class Board:
    """What a file of wandb says."""

    stored: Stored = field(default_factory=lambda: {name: {} for name in NAMES})
    run: tuple[str, str, str] = ("", "", "")  # name, group and stage
    axes: dict[str, str] = field(default_factory=dict)  # metric -> over what it is drawn
    kinds: dict[str, str] = field(default_factory=dict)  # name -> kind of medium
    summary: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)


def read_wandb(file: Path) -> Board:
    board = Board()
    for record in wandb_records(file):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in set(NAMES) & set(row):
            board.stored[name][row["trainer/global_step"]] = row[name]
        board.kinds |= {name.removesuffix("/_type"): str(v) for name, v in row.items() if name.endswith("/_type")}
        for known, items in ((board.summary, record.summary.update), (board.config, record.config.update)):
            known |= {"/".join([i.key, *i.nested_key]).strip("/"): i.value_json for i in items}
        board.alerts += [record.alert.title] if record.alert.title else []
        board.axes |= {record.metric.name: record.metric.step_metric} if record.metric.step_metric else {}
        if record.run.run_id:
            board.run = record.run.display_name, record.run.run_group, record.run.job_type
    return board


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    stored = {name: {event.step: event.value for event in events.Scalars(name)} for name in NAMES}
    assert stored == written()  # quarters are exact in float32
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["samples/text_summary"].splitlines()[2:] == ["| 1 | a &#124; b |", "| 10 | c d |"]
    assert texts["alarms/KL blow-up/text_summary"].startswith("iteration 3")
    assert "| ppo.score | 1.5 |" in texts["result/text_summary"]
    assert events.Histograms("samples/ratio")[0].histogram_value.num == 3


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: trackio reads its folder from the environment as it is imported."""
    pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    environment = {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": str(Path(__file__).parents[2])}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "run").mkdir()
    code = (
        "import json, sys; from pathlib import Path; from tests.loggers.test_boards import logged\n"
        "from trackio.sqlite_storage import SQLiteStorage as store\n"
        "logger = logged('trackio', Path(sys.argv[1]))\n"
        "stored = [store.get_logs('lightning-ppo', 'mine'), store.get_alerts('lightning-ppo', 'mine')]\n"
        "Path(sys.argv[1], 'stored.json').write_text(json.dumps(stored, default=str))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, alerts = json.loads((tmp_path / "run" / "stored.json").read_text())
    stored = {name: {row["step"]: row[name] for row in rows if name in row} for name in NAMES}
    assert stored == written()
    kinds = {value["_type"] for row in rows for value in row.values() if isinstance(value, dict) and "_type" in value}
    assert kinds == {"trackio.table", "trackio.histogram"}
    assert [alert["title"] for alert in alerts] == ["KL blow-up"]
    assert [row["result/ppo.score"] for row in rows if "result/ppo.score" in row] == [1.5]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow asks SQLAlchemy for it
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    logger = logged("mlflow", tmp_path)
    client, run = logger.experiment, logger.run_id
    stored = {name: {m.step: m.value for m in client.get_metric_history(run, name)} for name in NAMES}
    assert stored == written()
    data = client.get_run(run).data
    assert data.params["ppo/lr"] == "0.5"
    assert data.metrics["result/ppo.score"] == 1.5
    assert data.tags["alarm KL blow-up"].startswith("iteration 3")
    assert "samples.json" in [file.path for file in client.list_artifacts(run)]
    again = logged("mlflow", tmp_path)
    assert again.run_id == run


def test_several_loggers_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    loggers = stage_of(composed("logger=[wandb,tensorboard]"))._loggers(tmp_path)
    assert [type(one).__name__ for one in loggers] == ["CsvTables", "WandbBoard", "TensorBoardRun"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow"])
def test_a_missing_package_is_said_with_the_key_before_anything_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, f"src.loggers.{name}", raising=False)
    monkeypatch.delattr(src.loggers, name, raising=False)
    with pytest.raises(ConfigError) as error:
        stage_of(composed(f"logger={name}")).check_training()
    assert str(error.value).startswith(f"logger.{name}._target_=src.loggers.{name}.")
    assert f"the package {name} is not installed: pip install -e '.[{name}]'" in str(error.value)
