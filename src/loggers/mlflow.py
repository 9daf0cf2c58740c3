"""MLflow: a server, or `mlflow.db` in the run's folder (`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from src.loggers.packages import needs

needs("mlflow")

RUN = "mlflow.json"  # in the run's folder: which run of the server is its own


class MlflowRun(MLFlowLogger):
    """Lightning's logger with tables and alarms; a run folder has one run, which is resumed with it."""

    def __init__(self, experiment: str, name: str | None, save_dir: str, tracking_uri: str | None = None) -> None:
        self._folder = Path(save_dir).resolve()
        server = tracking_uri or os.getenv("MLFLOW_TRACKING_URI")
        uri, files = server or f"sqlite:///{self._folder / 'mlflow.db'}", str(self._folder / "mlflow-files")
        self.resumed = self._earlier()
        super().__init__(
            experiment,
            name or self._folder.name,
            tracking_uri=uri,
            run_id=self.resumed,
            artifact_location=None if server else files,
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration of a new run; MLflow refuses to change that of an older one."""
        if self.resumed is None:
            super().log_hyperparams(params)
            (self._folder / RUN).write_text(json.dumps(self.run_id) + "\n", encoding="utf-8")

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Keep a table as `KEY.json`, as MLflow's viewer of tables reads it."""
        self.experiment.log_dict(self.run_id, {"columns": columns, "data": data}, f"{key}.json")

    @rank_zero_only
    def alert(self, title: str, text: str, step: int) -> None:
        """Keep an alarm as a tag of the run."""
        self.experiment.set_tag(self.run_id, f"alarm {title}", text)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, float]) -> None:
        """Log the result as metrics of their own."""
        self.log_metrics({f"result/{name}": value for name, value in figures.items()})

    def _earlier(self) -> str | None:
        path = self._folder / RUN
        return str(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
