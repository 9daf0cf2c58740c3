"""What lies in a run's folder, also in one that is unfinished, half copied or of an older format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from src.errors import ConfigError

Table = dict[int, dict[str, float]]  # step -> number by name

STAGES = ("ppo", "reward", "sft")
FORMAT = 2  # of result.json, the only one whose figures are read (docs/results_format.md)
LENGTHS = {"ppo": ("ppo", "num_iterations"), "reward": ("reward_model", "steps"), "sft": ("sft", "steps")}


@dataclass
class RunData:
    """The content of a run's folder; what is not there is empty, and `missing` has a sentence for each such piece."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    metrics: Table = field(default_factory=dict)
    timing: Table = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)  # in the order of iterations
    comparison: list[dict[str, Any]] = field(default_factory=list)
    reward: dict[str, Any] = field(default_factory=dict)  # histogram and calibration of the reward model
    missing: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """`sft`, `reward` or `ppo`: what the configuration says, else what was logged."""
        logged = {name.split("/")[0] for row in self.metrics.values() for name in row}
        return str(self.config.get("stage") or next((s for s in ("sft", "reward") if s in logged), "ppo"))

    @property
    def name(self) -> str:
        """The folder's name; for a stage of a pipeline that of the pipeline's folder too."""
        return f"{self.folder.parent.name}/{self.folder.name}" if self.folder.name in STAGES else self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the result is there, which is written last; it may be one that cannot be read."""
        return (self.folder / "result.json").is_file()

    @property
    def steps(self) -> tuple[int, int | None]:
        """The last step that was logged, and how many there will be; None when that is not known."""
        node, key = LENGTHS.get(self.stage, LENGTHS["ppo"])
        block = self.config.get(node)
        planned = block.get(key) if isinstance(block, dict) else None
        return max(self.metrics, default=0), planned if isinstance(planned, int) else None


def stage_folders(given: str | Path) -> list[Path]:
    """The folders of the stages of a run or a pipeline, the last stage first; those it took its models from included.

    Raises `ConfigError` for a folder in which there is nothing to report.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{given}: there is no such folder")
    known = ("config.yaml", "metrics.csv", "result.json")
    if (folder / "config.yaml").is_file() or not any((folder / stage).is_dir() for stage in STAGES):
        if not any((folder / name).is_file() for name in known):
            raise ConfigError(f"{given}: no run lies there (none of {', '.join(known)}); give the folder of a run")
        found = [folder, *_sources(folder)]
    else:
        found = [folder / stage for stage in STAGES if (folder / stage).is_dir()]
    return list({path.resolve(): path for path in found}.values())


def read_run(folder: Path) -> RunData:
    """Read all there is."""
    run = RunData(folder)

    def read(name: str, parse: Callable[[Path], Any], empty: Any, needed: bool = True) -> Any:
        path = folder / name
        if not path.is_file():
            run.missing += [f"{name} is not there"] if needed else []
            return empty
        try:
            if not path.read_bytes().endswith(b"\n"):
                run.missing.append(f"{name} is not whole: its last line has no end")
            return parse(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
            run.missing.append(f"{name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            return empty

    run.config = read("config.yaml", _mapping, {})
    run.metrics = read("metrics.csv", lambda path: _table(path, run.missing), {})
    run.timing = read("timing.csv", lambda path: _table(path, run.missing), {}, needed=run.stage == "ppo")
    run.result = read("result.json", _mapping, {}, needed=False)
    if run.result and run.result.get("format") != FORMAT:
        run.missing.append(f"result.json has format {run.result.get('format')}, not {FORMAT}: it is left out")
        run.result = {}
    if not run.finished:
        run.missing.append("there is no result: the run trains, was interrupted or failed; the same command resumes it")
    run.reward = read("margins.json", _reward, {}, needed=run.stage == "reward" and run.finished)
    if run.stage == "ppo":
        run.comparison = read("comparison.jsonl", lambda path: _pairs(path, run.missing), [], needed=run.finished)
        for path in sorted((folder / "samples").glob("iteration-*.jsonl")):
            run.samples += read(f"samples/{path.name}", lambda path: _lines(path, run.missing), [])
        if not run.samples:
            run.missing.append("there are no samples in samples/")
    return run


def figures(result: dict[str, Any]) -> dict[str, dict[str, tuple[float, list[float] | None]]]:
    """Group -> figure -> (mean, 95% interval or None) of a result."""
    groups = {name: group for name, group in result.items() if isinstance(group, dict)}
    return {
        name: {
            figure: (value, _ends(group, figure)) for figure, value in group.items() if isinstance(value, int | float)
        }
        for name, group in groups.items()
    }


def _ends(group: dict[str, Any], figure: str) -> list[float] | None:
    """The interval of a figure; None where there is none, or something else."""
    intervals = group.get("interval")
    ends = intervals.get(figure) if isinstance(intervals, dict) else None
    numbers = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return ends if numbers else None


def _sources(folder: Path) -> list[Path]:
    """The folders of the runs that made the reward model and the model it started from, where they are still there."""
    try:
        config = _mapping(folder / "config.yaml")
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return []
    found = []
    for stage, node in (("reward", "reward"), ("sft", "model")):
        block = config.get(node)
        path = block.get("path") if isinstance(block, dict) else None
        places = [Path(path), Path(path).parent] if isinstance(path, str) and path else []
        if folder.name in STAGES:  # of a pipeline, which may have been moved
            places.append(folder.with_name(stage))
        found += [place for place in places if (place / "config.yaml").is_file()][:1]
    return found


def _mapping(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(content, dict):
        raise TypeError("names and values are wanted")
    return content


def _reward(path: Path) -> dict[str, Any]:
    content = _mapping(path)
    return {name: content[name] for name in ("edges", "pairs", "bins")}


def _table(path: Path, missing: list[str]) -> Table:
    """The rows of a table by step; a row that was cut off is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        rows, table = list(reader), {}
    for number, row in enumerate(rows, start=2):
        try:
            named = dict(zip(header, row, strict=True))
            step = int(named.pop("step"))
            table[step] = {name: float(value) for name, value in named.items() if value}
        except (ValueError, KeyError) as error:
            missing.append(f"{path.name}, line {number}: {error}; the line is left out")
    return table


def _lines(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The objects of a file with one per line; a line that was cut off is left out."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            content = json.loads(line)
            found.append(content if isinstance(content, dict) else dict(content))
        except (ValueError, TypeError) as error:
            missing.append(f"{path.name}, line {number}: {error}; the line is left out")
    return found


def _pairs(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The lines of the comparison that have a prompt and both answers."""
    rows = _lines(path, missing)
    found = [row for row in rows if isinstance(row.get("prompt"), str) and _answered(row)]
    if len(found) < len(rows):
        missing.append(f"{path.name}: {len(rows) - len(found)} lines without a prompt and two answers are left out")
    return found


def _answered(row: dict[str, Any]) -> bool:
    answers = [row.get(role) for role in ("sft", "ppo")]
    return all(isinstance(answer, dict) and isinstance(answer.get("response"), str) for answer in answers)
