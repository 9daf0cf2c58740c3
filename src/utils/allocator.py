"""What the C library's allocator does with memory that is no longer used."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

M_MMAP_THRESHOLD = -3  # the name of the setting in glibc's malloc.h
LIMIT = 2**19  # bytes; the activations of a few sequences are larger, what a decoding step makes is mostly smaller


def return_freed_memory() -> None:
    """From now on a block of 512 KiB or more goes back to the system as soon as it is freed.

    So glibc begins, with 128 KiB, but each such block that is freed raises the limit, up to 32 MiB; smaller blocks it
    keeps, and where tensors of many sizes come and go, much of what it keeps fits none of them. A limit that is set
    stays (mallopt(3)). It costs time, as the system fills every new block with zeros. It holds for the whole process.
    With another C library, or where MALLOC_MMAP_THRESHOLD_ says what is wanted, nothing is done.
    """
    if _is_glibc() and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LIMIT)


def trim() -> None:
    """Give back once what glibc keeps of freed memory; milliseconds, and a little more for memory taken anew."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
