"""The best rate of a 1024 x 1024 x 1024 matrix product on one thread: `python -m benchmarks.compare.rate`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

SIZE, REPEATS = 1024, 60


def ways(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The operators that may compute a b^T; oneDNN's own is faster than MKL's on some CPUs."""
    found: dict[str, Callable[[], Tensor]] = {
        "mm": lambda: torch.mm(a, b),
        "linear": lambda: torch.nn.functional.linear(a, b),
    }
    if a.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


@torch.no_grad()
def best(dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of each way, of the fastest of all repeats."""
    a, b = torch.randn(2, SIZE, SIZE).to(dtype).unbind()
    rates = {}
    for name, compute in ways(a, b).items():
        seconds = []
        for _ in range(REPEATS):
            since = time.perf_counter()
            compute()
            seconds.append(time.perf_counter() - since)
        rates[name] = 2 * SIZE**3 / min(seconds)
    return rates


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"float32": best(torch.float32), "bfloat16": best(torch.bfloat16)}))
