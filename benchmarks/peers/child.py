"""A side of a question: a process that prepares once, and then measures one round each time that its parent asks.

The parent passes a case as JSON in the first argument. The child answers by one line of JSON on stdout, its `facts` and its
`check`, and by one more line for each line that it reads from stdin, the figures of a round. Everything that libraries print
goes to stderr. Between two rounds the child waits for a line, so that it takes no time from the other sides. Every environment
runs this module, so it imports the standard library only.
"""

import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import machine

STARTED = "PEERS_STARTED"
"""The environment variable with the time in seconds since 1970 at which the parent started the process."""


class Side(NamedTuple):
    """A prepared side."""

    measure: Callable[[int], dict[str, float]]
    """Takes the number of the round, from 0, and returns its figures by metric."""
    facts: dict[str, Any]
    """The record of this side: versions, and the parts of one measured call."""
    check: dict[str, Any]
    """Numbers by name, which the other sides must have too where they have a number of that name."""


def serve(prepare: Callable[[dict[str, Any]], Side]) -> None:
    """Run the process of a side: the main function of its module."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = json.loads(sys.argv[1])
    side = prepare(case)
    answers.write(json.dumps({"facts": side.facts, "check": side.check}) + "\n")
    for number, _ in enumerate(sys.stdin):
        answers.write(json.dumps(side.measure(number)) + "\n")


def repeated(
    call: Callable[[], Any], case: dict[str, Any], *, finish: Callable[[Any], Any] = lambda value: None
) -> Callable[[int], dict[str, float]]:
    """Return the function that measures a round, the seconds of a call: a round has as many calls as ``case["round"]`` takes.

    Args:
      call: one call. Its result goes to ``finish``, which waits for the device.
      case: ``round``, seconds of a round, and ``warmup``, calls before the first round, at least 2. The first compiles;
        the last decides the number of calls of a round.
      finish: called on the last result of a round, within its time.
    """
    for _ in range(max(case["warmup"], 2)):
        begin = time.perf_counter()
        finish(call())
        once = time.perf_counter() - begin
    count = max(1, math.ceil(case["round"] / once))

    def measure(number: int) -> dict[str, float]:
        begin = time.perf_counter()
        for _ in range(count):
            value = call()
        finish(value)
        return {"seconds": (time.perf_counter() - begin) / count, "calls": count}

    return measure


def once(figures: dict[str, float]) -> Callable[[int], dict[str, float]]:
    """Return the function that gives the figures of a process that measures one round only, while it prepares."""
    return lambda number: figures


def age() -> float:
    """Return the seconds since the parent started this process."""
    return time.time() - float(os.environ[STARTED])


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of installed packages."""
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def read_through(path: str | os.PathLike[str]) -> None:
    """Read a file without keeping it, so that it is in the page cache."""
    with open(path, "rb", buffering=0) as opened:
        while opened.read(1 << 20):
            pass


def peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    return machine.peak()
