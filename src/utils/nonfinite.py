"""What is NaN or infinite among losses, gradients and logprobs: written down, and skipped or the end of the run."""

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
    """Leaves out what is not finite, up to `max_skipped_in_a_row` times; one more in a row stops the run.

    With 0 the first does. Either way the samples concerned go to `folder` (None: nowhere). Whoever asks brings numbers
    that are the same on every rank, so that all ranks decide alike.
    """

    def __init__(self, max_skipped_in_a_row: int, folder: str | None) -> None:
        require(max_skipped_in_a_row >= 0, "max_skipped_in_a_row", max_skipped_in_a_row, "at least 0")
        self.max_skipped_in_a_row, self.folder = max_skipped_in_a_row, Path(folder) if folder is not None else None
        self.skipped = 0  # since the beginning of the run
        self.in_a_row: dict[str, int] = {}

    def passes(
        self, part: str, step: int, numbers: Mapping[str, float], samples: Callable[[], list[dict[str, Any]]]
    ) -> bool:
        """Whether all numbers are finite; if one is not, `samples()` are written down and counted.

        `part` is what takes a step (policy, critic, sft, reward) or the experience; each has its own count in a row.
        Raises `NonFiniteError` when there were too many.
        """
        broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if not broken:
            self.in_a_row[part] = 0
            return True
        said = f"step {step}, {part}: " + ", ".join(f"{name} is {value}" for name, value in sorted(broken.items()))
        where = self._write(f"{step:06d}-{part}-{self.skipped}.jsonl", said, samples)
        self.in_a_row[part] = self.in_a_row.get(part, 0) + 1
        if self.in_a_row[part] > self.max_skipped_in_a_row:
            raise NonFiniteError(
                f"{said}{where}. Nothing was learned from it, and the last checkpoint stands. A lower learning rate, a "
                f"smaller max_grad_norm or model.dtype=float32 may help; nonfinite.max_skipped_in_a_row=3 leaves out "
                f"up to 3 in a row"
            )
        if self.skipped == 0 and rank() == 0:
            warnings.warn(f"{said}{where}; it is left out, and counted in train/skipped_steps", stacklevel=2)
        self.skipped += 1
        return False

    def _write(self, name: str, said: str, samples: Callable[[], list[dict[str, Any]]]) -> str:
        """Write the samples, on one rank, and say where; a replayed iteration writes the same file again."""
        if self.folder is None:
            return ""
        path = self.folder / name
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = [{"what": said, **sample} for sample in samples()]
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return f"; its samples are in {path}"

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"skipped": self.skipped, "in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again."""
        self.skipped, self.in_a_row = state["skipped"], dict(state["in_a_row"])


def json_number(number: float) -> float | str:
    """A number as JSON can hold it: "nan" and "inf" in words."""
    return number if math.isfinite(number) else str(number)
