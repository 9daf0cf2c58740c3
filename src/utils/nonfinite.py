"""NaN and infinity in losses, gradients and logprobs: written to a file, then skipped or raised."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.errors import NonFiniteError, require
from src.utils.distributed import rank


class FiniteGuard:
    """Skips steps that are not finite, up to `max_skipped_in_a_row` times; one more in a row stops the run.

    Their samples are written to `folder` (None: not written). The checked numbers must be the same on every rank, so
    that all ranks decide alike.
    """

    def __init__(self, max_skipped_in_a_row: int, folder: str | None) -> None:
        require(max_skipped_in_a_row >= 0, "max_skipped_in_a_row", max_skipped_in_a_row, "at least 0")
        self.max_skipped_in_a_row, self.folder = max_skipped_in_a_row, Path(folder) if folder is not None else None
        self.skipped = 0  # in the whole run
        self.in_a_row: dict[str, int] = {}

    def passes(
        self, part: str, step: int, numbers: Mapping[str, float], samples: Callable[[], list[dict[str, Any]]]
    ) -> bool:
        """Whether all numbers are finite; if not, `samples()` are written and the step is counted.

        `part` is policy, critic, sft, reward or the experience; each counts its steps in a row separately. Raises
        `NonFiniteError` when there were too many.
        """
        broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if not broken:
            self.in_a_row[part] = 0
            return True
        what = f"step {step}, {part}: " + ", ".join(f"{name} is {value}" for name, value in sorted(broken.items()))
        where = self._write(f"{step:06d}-{part}-{self.skipped}.jsonl", what, samples)
        self.in_a_row[part] = self.in_a_row.get(part, 0) + 1
        if self.in_a_row[part] > self.max_skipped_in_a_row:
            raise NonFiniteError(
                f"{what}{where}; nothing was learned from it, and the last checkpoint is kept: a lower learning rate, "
                f"a smaller max_grad_norm or model.dtype=float32 may help, and nonfinite.max_skipped_in_a_row=3 skips "
                f"up to 3 in a row"
            )
        if self.skipped == 0 and rank() == 0:
            warnings.warn(f"{what}{where}; it is skipped, and counted in train/skipped_steps", stacklevel=2)
        self.skipped += 1
        return False

    def _write(self, name: str, what: str, samples: Callable[[], list[dict[str, Any]]]) -> str:
        """Write the samples, on one rank; returns a clause with the path. A replayed iteration overwrites its file."""
        if self.folder is None:
            return ""
        path = self.folder / name
        rows = [{"what": what, **sample} for sample in samples()]  # on every rank: its passes may need all of them
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return f"; its samples are in {path}"

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"skipped": self.skipped, "in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.skipped, self.in_a_row = state["skipped"], dict(state["in_a_row"])


def json_number(number: float) -> float | str:
    """A number as JSON can hold it: NaN and infinity as strings."""
    return number if math.isfinite(number) else str(number)
