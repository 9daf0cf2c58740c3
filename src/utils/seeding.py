"""Named random streams: the same (seed, stream, counters) always gives the same numbers.

No generator is shared, so evaluation, logging and resuming never change the random numbers of training.
"""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed derived from the run's seed, the name of the stream and counters (iteration, epoch)."""
    key = "/".join([str(seed), stream, *map(str, counters)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator at the start of the named stream."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream, *counters))
