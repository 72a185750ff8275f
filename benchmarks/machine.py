"""This machine: its processor, its cores, and the peak memory of this process. Imports the standard library only."""

import os
import pathlib
import platform
import resource
import sys


def cpu() -> str:
    """Return the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def name() -> str:
    """Return the processor, the number of its cores that this process may use, and the system."""
    return f"{cpu()}, {len(cores())} cores, {platform.system()} {platform.machine()}"


def cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def peak() -> int:
    """Return the peak resident memory of this process in bytes; on Linux a process inherits the peak of its parent."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
