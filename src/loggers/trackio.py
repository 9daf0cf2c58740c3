"""Trackio: a dashboard on this machine (`trackio show`), in its own store (`TRACKIO_DIR`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from src.loggers.packages import needs

needs("trackio")

import trackio  # noqa: E402


class TrackioRun(Logger):
    """A run of trackio, resumed with the run's folder. `options`: those of `trackio.init`."""

    def __init__(self, project: str, name: str | None, save_dir: str, **options: Any) -> None:
        super().__init__()
        folder = Path(save_dir).resolve()
        self._project, self._run_name, self._options = project, name or f"{folder.parent.name}-{folder.name}", options
        self._begun = folder / "trackio.begun"
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The name of the run."""
        return self._run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, started when it is first asked for."""
        if self._run is None:
            resume = "allow" if self._begun.is_file() else "never"  # another folder's run may have the same name
            self._run = trackio.init(project=self._project, name=self._run_name, resume=resume, **self._options)
            self._begun.touch()
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep the configuration with the run."""
        self.experiment.config.update(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step."""
        self.experiment.log({name: float(value) for name, value in metrics.items() if name != "epoch"}, step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Log a table."""
        import pandas

        self.experiment.log({key: trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))})

    @rank_zero_only
    def log_histograms(self, values: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the distribution of each named row of numbers."""
        self.experiment.log({name: trackio.Histogram(list(row)) for name, row in values.items()}, step=step)

    @rank_zero_only
    def alert(self, title: str, text: str, step: int) -> None:
        """Show an alarm among the run's alerts."""
        self.experiment.alert(title=title, text=text, level=trackio.AlertLevel.WARN)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Log the result."""
        self.experiment.log({f"result/{name}": value for name, value in figures.items()})
