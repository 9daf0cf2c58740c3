"""Whether freed memory goes back to the system, seen from outside: by what the process holds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from src.models import roles
from tests.tiny import FOREIGN_WARNINGS, make_roles, write_lm

pytestmark = FOREIGN_WARNINGS

RESIDENT = """
import torch
from src.utils.allocator import keep_freed_memory, trim

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
"""
# Of 200 blocks of 1 MiB every other one is freed. A larger block was freed before: with that glibc raises its limit.
HOLES = """
large = torch.ones(2**22)
del large
blocks = [torch.ones(2**18) for _ in range(200)]
before = resident()
del blocks[::2]
trim()
print(before - resident())
"""
BLOCKS = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(2**24))
before = resident()
blocks = [libc.malloc(2**20) for _ in range(100)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
for block in reversed(blocks):
    libc.free(block)
END()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("call", "environment", "held"),
    [
        ("", {}, 0),
        ("keep_freed_memory()", {}, 100),
        ("keep_freed_memory()", {"MALLOC_TRIM_THRESHOLD_": str(2**25)}, 0),
        ("keep_freed_memory(); END = trim", {}, 0),
    ],
    ids=["plain", "kept", "the user's own setting", "trimmed"],
)
def test_freed_memory_is_kept_until_it_is_given_back(call: str, environment: dict[str, str], held: int) -> None:
    """100 MiB in blocks that glibc would not take from the system one by one, all freed, the last of them first.

    The blocks come from malloc itself: a tensor's own small record, kept by glibc for the next tensor, could lie
    behind its block and hold all before it.
    """
    program = f"{RESIDENT}\nEND = int\n{call}\n{BLOCKS}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, env=inherited | environment
    )
    assert float(done.stdout) == pytest.approx(held, abs=20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_trimming_gives_back_what_is_kept() -> None:
    """The same blocks without a limit: what glibc keeps of the 100 MiB goes back when it is asked to."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT + HOLES], check=True, stdout=subprocess.PIPE, text=True, env=inherited
    )
    assert float(done.stdout) == pytest.approx(100, abs=20)


@pytest.mark.parametrize("lora", [True, False])
def test_every_run_keeps_it(
    lora: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(roles, "keep_freed_memory", lambda: asked.append(True))
    base = write_lm(tmp_path_factory.mktemp("base"))
    make_roles(base) if lora else make_roles(base, lora=None)
    assert asked == [True]
