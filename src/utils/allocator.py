"""Settings of the C library's allocator for freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # the names of the settings in glibc's malloc.h
KEPT, LARGEST = 2**30, 2**25  # bytes; the second is the largest limit that glibc sets itself


def keep_freed_memory() -> None:
    """Keep freed memory in the process until `trim`, except blocks of 32 MiB or more.

    By default glibc returns memory when 64 MiB at the end of its heap are free. A training step allocates and frees
    more than that, and the system would fill all of it with zeros every time. Does nothing with another C library, or
    if an environment variable sets a limit.
    """
    if _is_glibc() and not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)  # glibc no longer adapts it when one of the two is set


def trim() -> None:
    """Return glibc's freed memory to the system once; takes milliseconds, and slows the next allocations a little."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
