"""A GPU that is pretended: CPU tensors that carry the name of another device, and an error where the two meet.

Numbers are computed as ever. A tensor made for the other device, or from one that is there, is marked; an operation of
marked and unmarked ones raises `RuntimeError`, as on a real GPU, where numbers (0 dimensions) and an index from the CPU
are allowed. A gradient is where its parameter is; what else comes out of C++ alone has no mark and may meet either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FACTORIES = {
    *(torch.tensor, torch.as_tensor, torch.from_numpy, torch.empty, torch.zeros, torch.ones, torch.full, torch.eye),
    *(torch.arange, torch.rand, torch.randn, torch.randint, torch.randperm, torch.linspace),
}  # fmt: skip
INDEXING = {"__getitem__", "__setitem__"}
BETWEEN_DEVICES = {"copy_", "__deepcopy__", "_has_compatible_shallow_copy_type"}


def mark(result: Any, device: torch.device | None) -> Any:
    """Say of all tensors in a result where they are."""
    for tensor in tensors([result]):
        if device is not None:
            tensor.pretended = device  # type: ignore[attr-defined]
    return result


def where(tensor: Tensor) -> torch.device | None:
    """Where it is; None: nobody has said."""
    return getattr(tensor, "pretended", None)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from tensors(value.values() if isinstance(value, dict) else value)


class PretendedGPU(TorchFunctionMode):
    """While this is entered, `torch.device("cuda", 0)` is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation of torch that Python calls."""
        name, kwargs = func.__name__, dict(kwargs or {})
        if name in ("__get__", "__set__"):
            return self._attribute(func, func.__self__.__name__, args)
        if name in ("to", "cpu"):
            return self._moved(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
        here = self._checked(name, args, kwargs)
        if asked is None and func in FACTORIES:
            asked = here or CPU
        return mark(func(*args, **kwargs), here if asked is None else torch.device(asked))

    @staticmethod
    def _attribute(func: Any, name: str, args: tuple[Any, ...]) -> Any:
        if name == "device":
            return where(args[0]) or func(*args)
        result = func(*args)
        if name == "data" and len(args) == 2:  # it is being set
            mark(args[0], where(args[1]) or CPU)
        return mark(result, where(args[0])) if name in ("data", "grad", "T", "mT") else result

    @staticmethod
    def _moved(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`to` and `cpu`: a copy when the device is another one."""
        targets = [*args[1:], kwargs.get("device"), *([CPU] if func is Tensor.cpu else [])]
        named = [where(t) or t.device if isinstance(t, Tensor) else t for t in targets]
        device = next((torch.device(t) for t in named if isinstance(t, torch.device | str)), where(args[0]))
        plain = [CPU if isinstance(t, torch.device | str) else t for t in args]
        result = func(*plain, **(kwargs | ({"device": CPU} if "device" in kwargs else {})))
        if result is args[0] and device is not where(result):
            result = result.detach().clone() if result.is_leaf else result.clone()
        return mark(result, device)  # type: ignore[no-any-return]

    @staticmethod
    def _checked(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
        """Where the operands are. Raises `RuntimeError` when that is two places."""
        operands = list(tensors([args, kwargs]))
        if name in INDEXING and operands and (where(operands[0]) == GPU):
            operands = [operands[0], *(t for t in args[2:] if isinstance(t, Tensor))]
        places = [where(t) for t in operands if t.dim() > 0 and where(t) is not None]
        if len(set(places)) > 1 and name not in BETWEEN_DEVICES:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but they are on {places}")
        found = {where(t) for t in operands}
        return GPU if GPU in found else CPU if CPU in found else None


class OnPretendedGPU(SingleDeviceStrategy):
    """Lightning's strategy for one device, for that one."""

    def __init__(self) -> None:
        super().__init__(device=GPU, accelerator=_Accelerator())


class _Accelerator(CPUAccelerator):
    """Lightning's own refuses any other device."""

    def setup_device(self, device: torch.device) -> None:
        """There is nothing to set up."""
