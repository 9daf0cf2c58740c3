"""What the C library's allocator does with memory that is no longer used."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # the names of the settings in glibc's malloc.h
KEPT, LARGEST = 2**30, 2**25  # bytes; the second is what glibc raises the limit to at most
LARGE = 2**28  # bytes of a model from which whole copies of it fill the memory: 64M parameters in float32
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


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process until `trim`, but for blocks of 32 MiB or more.

    By itself glibc gives it back as soon as 64 MiB at the end of what it holds are free, and a training step, which
    takes more than that and frees it again, would have the system fill all of it with zeros every time. With another
    C library, or where an environment variable says what is wanted, nothing is done.
    """
    if _is_glibc() and not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)  # glibc no longer finds it out when one of the two is set


def trim() -> None:
    """Give back once what glibc keeps of freed memory; milliseconds, and a little more for memory taken anew."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
