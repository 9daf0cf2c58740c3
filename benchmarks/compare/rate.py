"""The machine's best rates: `python -m benchmarks.compare.rate [cuda]`.

A square matrix product, in operations per second: 1024^3 on one thread of a CPU, 8192^3 on a GPU. A copy of memory, in
bytes read and written per second.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

SIZE, REPEATS = {"cpu": 1024, "cuda": 8192}, 60
LONGEST = 3.0  # seconds; a CPU without units for bfloat16 needs two for one product
COPIED = {"cpu": 2**28, "cuda": 2**32}  # bytes, more than a cache


def ways(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The operators that can compute a b^T; oneDNN is faster than MKL on some CPUs."""
    found: dict[str, Callable[[], Tensor]] = {
        "mm": lambda: torch.mm(a, b),
        "linear": lambda: torch.nn.functional.linear(a, b),
    }
    if a.device.type == "cpu" and a.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


def seconds(compute: Callable[[], object], device: str) -> float:
    """Seconds of the fastest repeat; of fewer than `REPEATS` if they take longer than `LONGEST`."""
    found: list[float] = []
    while len(found) < REPEATS and sum(found) < LONGEST:
        since = time.perf_counter()
        compute()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - since)
    return min(found)


@torch.no_grad()
def best(dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Operations per second of each operator."""
    a, b = torch.randn(2, SIZE[device], SIZE[device]).to(device, dtype).unbind()
    return {name: 2 * SIZE[device] ** 3 / seconds(compute, device) for name, compute in ways(a, b).items()}


def bandwidth(device: str) -> float:
    """Bytes per second."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED[device] / seconds(lambda: target.copy_(source), device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    rates = {name: best(getattr(torch, name), chosen) for name in ("float32", "bfloat16")}
    print(json.dumps(rates | {"bandwidth": {"copy": bandwidth(chosen)}}))
