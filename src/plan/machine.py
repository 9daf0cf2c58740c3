"""What a machine does in a second: measured here (`python -m src.plan.measure`), or from a card's published figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from src.errors import ConfigError
from src.plan.work import KINDS, Work

BY_DTYPE = ("float32", "bfloat16")
MEASURED = Path("logs") / "machine.json"


@dataclass(frozen=True)
class Machine:
    """Seconds per unit of each kind of work, by dtype; a kind that is missing is unknown.

    `overlaps`: operators are launched while earlier ones run, so that calls and the rest take the longer of both times.
    """

    name: str
    source: str
    seconds: dict[str, dict[str, float]]
    overlaps: bool = False

    def split(self, work: Work, dtype: str) -> dict[str, float]:
        """Seconds of each kind of work. Raises `ConfigError` for a dtype or a kind that the machine has no rate for."""
        known = self.seconds.get(dtype)
        if known is None:
            raise ConfigError(
                f"{self.name} has no rates for model.dtype={dtype} (known: {', '.join(self.seconds)}); measure them: "
                f"python -m src.plan.measure"
            )
        if work.sent and "sent" not in known:
            raise ConfigError(f"{self.name} has no rate between ranks: give --link GB/s, of one direction")
        amounts = {kind: getattr(work, kind) for kind in KINDS if getattr(work, kind)}
        for kind in amounts.keys() - known.keys():
            raise ConfigError(f"{self.name} has no rate of {kind}: python -m src.plan.measure")
        return {kind: known[kind] * amount for kind, amount in amounts.items()}

    def time(self, work: Work, dtype: str) -> float:
        """Seconds of the work."""
        found = self.split(work, dtype)
        if not self.overlaps:
            return sum(found.values())
        sent, launching = found.pop("sent", 0.0), found.pop("calls", 0.0)
        return sent + max(launching, sum(found.values()))

    def linked(self, gigabytes: float) -> Machine:
        """The same with a link between ranks of so many 10^9 bytes per second in one direction."""
        seconds = {dtype: known | {"sent": 1e-9 / gigabytes} for dtype, known in self.seconds.items()}
        return Machine(self.name, self.source, seconds, self.overlaps)

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(file: Path) -> Machine:
        """Read what `save` wrote. Raises `ConfigError` for a file that is missing or is none."""
        try:
            return Machine(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{file} does not exist: measure this machine by python -m src.plan.measure") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file} has no rates of a machine ({error}): python -m src.plan.measure") from error


@dataclass(frozen=True)
class Card:
    """A GPU's published figures: peak of dense bfloat16 products, bandwidth of its memory, link, memory."""

    flops: float  # per second
    bandwidth: float  # bytes per second
    link: float  # bytes per second that one card sends to the others of its machine
    memory: float  # bytes


CARDS = {
    "A100": Card(312e12, 2.039e12, 300e9, 80e9),
    "H100": Card(989e12, 3.35e12, 450e9, 80e9),
    "H200": Card(989e12, 4.8e12, 450e9, 141e9),
}
# Shares of the published figures; "measured" is benchmarks/results/gpu.md, which has no training of a large model.
PRODUCTS, ATTENTION = 0.40, 0.20  # assumed
BANDWIDTH = 0.9  # measured: 3.0 of 3.35 TB/s for a copy on an H100
CALL = 148e-6  # measured: a minibatch of GPT-2: 192 ms for 24 layer passes forward and backward of 54 calls each
STEP = 7.4e-6  # measured: replayed decoding of Llama 1B: 4.2 - 1.0 ms per step of 16 layers of 27 calls each
LINK = 0.7  # assumed
PASSES = 2  # an element is read and written


def card(name: str) -> Machine:
    """A machine of such cards; bfloat16. Raises `ConfigError` for an unknown name."""
    if name not in CARDS:
        raise ConfigError(f"--card {name} is not known: one of {', '.join(CARDS)}")
    figures = CARDS[name]
    element = PASSES * 2 / (BANDWIDTH * figures.bandwidth)
    seconds = {
        "products": 1 / (PRODUCTS * figures.flops), "attention": 1 / (ATTENTION * figures.flops),
        "bytes": 1 / (BANDWIDTH * figures.bandwidth), "elements": element, "calls": CALL, "steps": STEP,
        "updates": 7 * 4 / (BANDWIDTH * figures.bandwidth),  # weight, gradient, two moments read; three written
        "sent": 1 / (LINK * figures.link),
    }  # fmt: skip
    return Machine(name, "published figures, no measurement", {"bfloat16": seconds}, overlaps=True)
