"""This machine: its processor, its cores, and the peak memory of this process. Imports the standard library only."""

import os
import pathlib
import platform
import resource
import sys
import time
from typing import NamedTuple


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


class Use(NamedTuple):
    """Seconds of CPU that a machine and a process have used so far, outside of the kernel.

    The kernel works for several processes at once, so its seconds belong to none of them.
    """

    wall: float
    """Seconds of a clock that only goes forward."""
    machine: float | None
    """Of all processes; None where the system does not tell."""
    own: float
    """Of this process and of its ended children."""


def use() -> Use:
    """Return what is used by now; two of them give `others`."""
    stat = pathlib.Path("/proc/stat")
    machine = None
    if stat.exists():
        _, user, nice, *_ = stat.read_text(encoding="utf-8").split()
        machine = (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK")
    own = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Use(time.perf_counter(), machine, own)


def others(begin: Use, end: Use) -> float | None:
    """Return how many cores other processes used between two calls of `use`, on the mean; None where that is unknown."""
    if begin.machine is None or end.machine is None:
        return None
    return max(0.0, (end.machine - begin.machine - (end.own - begin.own)) / (end.wall - begin.wall))


def peak() -> int:
    """Return the peak resident memory of this process in bytes; on Linux a process inherits the peak of its parent."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
