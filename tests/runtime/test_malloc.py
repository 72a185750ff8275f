"""Freed memory stays in the process: a new allocation of the same size causes no page faults."""

import os
import platform
import subprocess
import sys

import pytest

import train
from dsee_jax import __main__ as commands
from dsee_jax.runtime import malloc

CHOICE = "MALLOC_TRIM_THRESHOLD_"
FAULTS = """
import resource
import numpy as np
from dsee_jax.runtime import malloc

if {keep}:
    assert malloc.keep_freed_memory()

def fill():
    for _ in range(20):
        # Freed together, so that the top of the heap is free; NumPy asks for huge pages for 4 MiB and more.
        blocks = [np.ones(1 << 19, np.float32) for _ in range(64)]
        del blocks

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keep: bool) -> int:
    """The page faults of a process that allocates and frees 128 MiB twenty times, after twenty times before."""
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    environment = {name: value for name, value in os.environ.items() if name != CHOICE}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_causes_no_page_faults():
    pages = 20 * 32 * 1024
    assert faults(keep=False) > pages // 2
    assert faults(keep=True) < pages // 100


def test_other_c_library_stays_unchanged(monkeypatch):
    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)
    assert malloc.keep_freed_memory() is False


def test_choice_of_the_environment_stays(monkeypatch):
    monkeypatch.setenv(CHOICE, "131072")
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)
    assert malloc.keep_freed_memory() is False


@pytest.mark.parametrize("command", [train.main, commands.main], ids=["train", "dsee_jax"])
def test_commands_keep_freed_memory(monkeypatch, capsys, tmp_path, command):
    called = []
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: called.append(True))
    command([str(tmp_path / "none.yaml")] if command is train.main else ["evaluate", str(tmp_path)])
    assert called == [True]
