"""Freed memory stays with the process: what is allocated again causes no page faults."""

import platform
import subprocess
import sys

import pytest

from dsee_jax import heap

FAULTS = """
import resource
import numpy as np
from dsee_jax import heap

if {keep}:
    assert heap.keep()

def fill():
    for _ in range(20):
        # Freed together, so that the top of the heap is free; NumPy asks for huge pages from 4 MiB on.
        blocks = [np.ones(1 << 19, np.float32) for _ in range(64)]
        del blocks

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keep: bool) -> int:
    """Page faults of a process that takes and gives back 128 MiB twenty times, after it did so before."""
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_memory_that_is_kept_is_not_faulted_in_again():
    pages = 20 * 32 * 1024
    assert faults(keep=False) > pages // 2
    assert faults(keep=True) < pages // 100


@pytest.mark.parametrize(
    ("library", "environment"), [("", {}), ("glibc", {"MALLOC_TRIM_THRESHOLD_": "131072"})], ids=["musl", "chosen"]
)
def test_what_is_not_glibc_or_was_chosen_is_left_alone(monkeypatch, library, environment):
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: (library, "2.36"))
    monkeypatch.setattr(heap.os, "environ", environment)
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    assert heap.keep() is False
