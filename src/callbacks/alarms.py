"""Alarms while PPO trains: what looks wrong in the logged numbers, said once, with the likely cause and what to try."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, Trainer

from src.modules.ppo import PPOModule
from src.report.alarms import READ, Alarm, fired
from src.types import Experience

log = logging.getLogger(__name__)

NOT_SEEN = ("time/", "train/")  # what no rule reads


class Alarms(Callback):
    """Logs each rule of `src/report/alarms.py` the first time that it fires; with `stop` it also ends the training.

    Loggers that have alerts get one too. The page of the run finds the same alarms in `metrics.csv`. Also logs
    `rollout/distinct`. Must come before the callbacks that write tables, pages and checkpoints.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.rows: list[dict[str, float]] = []
        self.fired: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: PPOModule) -> None:
        """Stop again if the run was interrupted just after its stop."""
        trainer.should_stop = trainer.should_stop or (self.stop and bool(self.fired))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: PPOModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Ask the rules."""
        experience: Experience = batch["experience"]
        texts = experience.rollout.responses
        distinct = len(set(texts)) / len(texts)
        pl_module.log("rollout/distinct", distinct, batch_size=len(texts))
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        row = {name: value for name, value in logged.items() if not name.startswith(NOT_SEEN)}
        self.rows.append(row | {"rollout/distinct": distinct, "max_grad_norm": pl_module.settings.max_grad_norm})
        alarms = fired(self.rows, self.fired)
        self.rows[-1] = {name: value for name, value in self.rows[-1].items() if name in READ}
        for alarm in alarms:
            self.fired.append(alarm.rule.name)
            if trainer.is_global_zero:
                self._tell(trainer, batch_idx + 1, alarm)
            trainer.should_stop = trainer.should_stop or self.stop

    def _tell(self, trainer: Trainer, done: int, alarm: Alarm) -> None:
        text = f"iteration {done}: {alarm.sentence()}"
        log.warning("alarm at %s%s", text, "; training ends, as ppo.stop_on_alarm is set" if self.stop else "")
        for logger in trainer.loggers:
            if hasattr(logger, "alert"):
                logger.alert(alarm.rule.name, text, done)

    def state_dict(self) -> dict[str, Any]:
        """The rows, and the rules that have fired."""
        return {"rows": [dict(row) for row in self.rows], "fired": list(self.fired)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.rows, self.fired = [dict(row) for row in state_dict["rows"]], list(state_dict["fired"])
