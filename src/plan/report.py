"""The plan of a run as tables: memory by role and phase, what fits where, and the seconds of an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table

from src.config.schema import PPORun
from src.errors import ConfigError
from src.memory.report import estimate_of, memory_table
from src.plan.devices import GB, on_device
from src.plan.iteration import Plan, Ranks, Roles, Sizes, iteration
from src.plan.machine import Machine
from src.plan.read import dtype_of, ranks_of, roles_of, sizes_of

NO_RATES = "Seconds: measure this machine by python -m src.plan.measure, or name a --card."


@dataclass(frozen=True)
class Forecast:
    """Seconds of an iteration, by (phase, role)."""

    seconds: dict[tuple[str, str], float]

    @property
    def total(self) -> float:
        """Of the whole iteration."""
        return sum(self.seconds.values())

    def of(self, phase: str) -> float:
        """Of one phase."""
        return sum(value for (name, _), value in self.seconds.items() if name == phase)


def forecast(machine: Machine, work: Plan, dtype: str) -> Forecast:
    """Seconds of a rank's work. A reward model with weights computes in float32 where the machine has a rate for it."""
    own = "float32" if "float32" in machine.seconds else dtype
    return Forecast({key: machine.time(one, own if key[1] == "reward" else dtype) for key, one in work.items()})


def strategies(run: PPORun, devices: int | None) -> list[Ranks]:
    """One device, and several with the whole model or a shard on each, where the engine allows it.

    Raises `ConfigError` for rows that they do not divide.
    """
    count = devices or ranks_of(run).count
    for key, rows in (("batch_size", run.ppo.batch_size), ("minibatch_size", run.ppo.minibatch_size)):
        if rows % count:
            raise ConfigError(f"ppo.{key}={rows} is no multiple of {count} devices: give one that is")
    engine = run.choices["engine"]
    several = [Ranks(count)] * (engine != "vllm") + [Ranks(count, sharded=True)] * (engine == "local")
    return [Ranks(), *(several if count > 1 else [])]


def report(
    run: PPORun, machine: Machine | None, devices: int | None, memory: float | None, prompt: float | None,
    response: float | None,
) -> Iterator[RenderableType]:  # fmt: skip
    """The tables, in the order in which they are read."""
    found = estimate_of(run)
    yield memory_table(found)
    roles, sizes, choices = roles_of(run, found), sizes_of(run, prompt, response), strategies(run, devices)
    yield fits_table(run, roles, sizes, choices, machine, memory)
    if machine is None:
        yield NO_RATES
        return
    chosen = ranks_of(run) if devices is None else Ranks(devices, ranks_of(run).sharded)
    yield time_table(machine, roles, sizes, chosen, dtype_of(run))


def fits_table(
    run: PPORun, roles: Roles, sizes: Sizes, choices: list[Ranks], machine: Machine | None, memory: float | None
) -> Table:
    """A row for each strategy: memory of a device, whether it fits, seconds of an iteration."""
    size = "" if memory is None else f" of {memory:g} GB"
    table = Table(title=f"on GPUs{size}, engine={run.choices['engine']}")
    for column in ("strategy", "GB on each", "fits", "fullest while", "s / iteration"):
        table.add_column(column, justify="left" if column in ("strategy", "fullest while") else "right")
    for ranks in choices:
        held = on_device(run, roles.policy, ranks)
        seconds = (
            "" if machine is None else f"{forecast(machine, iteration(roles, sizes, ranks), dtype_of(run)).total:.3g}"
        )
        fits = "" if memory is None else ("yes" if held.fits(memory) else "no")
        table.add_row(strategy(ranks), f"{held.bytes / GB:.1f}", fits, held.phase, seconds)
    return table


def strategy(ranks: Ranks) -> str:
    """Its name on the command line."""
    if ranks.count == 1:
        return "one device"
    return f"trainer={'fsdp' if ranks.sharded else 'ddp'}, {ranks.count} devices"


def time_table(machine: Machine, roles: Roles, sizes: Sizes, ranks: Ranks, dtype: str) -> Table:
    """Seconds of an iteration by phase and role."""
    found = forecast(machine, iteration(roles, sizes, ranks), dtype)
    responses = sizes.rows * sizes.response
    table = Table(
        title=f"an iteration on {machine.name}, {strategy(ranks)}: {found.total:.3g} s predicted, "
        f"{responses / found.total:,.0f} response tokens / s",
        caption=f"{machine.source}; {dtype}; {sizes.rows} prompts of {sizes.prompt:g} tokens, responses of "
        f"{sizes.response:g}",
    )
    for column in ("phase", "role", "seconds", "share"):
        table.add_column(column, justify="left" if column in ("phase", "role") else "right")
    for (phase, role), value in found.seconds.items():
        table.add_row(phase, role, f"{value:.3g}", f"{value / found.total:.0%}")
    return table
