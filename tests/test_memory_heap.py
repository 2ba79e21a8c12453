"""Freed memory stays in the process, where the C library can be told so."""

import subprocess
import sys

import pytest

from lora_sd.memory.heap import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from lora_sd.memory.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB, 16384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
if not keep_freed_memory():
    sys.exit(77)
faults()
print(usual, faults())
"""


def test_what_is_freed_is_used_again_without_the_system_clearing_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this C library is not glibc")
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 10


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("no mallopt there"))
    assert not keep_freed_memory()
