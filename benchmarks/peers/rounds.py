"""The processes of a case, measured in turns."""

import contextlib
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.child import STARTED
from dsee_jax.runtime import malloc

ROOT = Path(__file__).parents[2]
PACKAGE = "benchmarks.peers"


class Failed(Exception):
    """A side ended with an error, or computes other numbers than the first side."""


class Launch(NamedTuple):
    """A side of a case, ready to start."""

    python: str
    module: str
    case: Mapping[str, Any]


def threads(count: int) -> dict[str, str]:
    """Return the environment variables that give the libraries of every side ``count`` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC", "PEERS_THREADS")
    return dict.fromkeys(names, str(count))


DROPPED = (
    *("GLIBC_TUNABLES", "MALLOC_", "XLA_PYTHON_CLIENT_", "JAX_", "TORCH", "PYTORCH_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_"),
)
"""How variables begin that change figures: no side has those of the user's environment. XLA_FLAGS stay and are recorded."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(malloc.MAPPED), "MALLOC_TRIM_THRESHOLD_": str(malloc.KEPT)}
"""The environment variables of glibc that give a process the memory settings of this library's commands."""


def environment(inherited: Mapping[str, str], own: Mapping[str, str], count: int) -> dict[str, str]:
    """Return the environment of a side: what it inherits without `DROPPED`, the harness' settings, and its ``own``."""
    # The platform decides where a side runs, and is no setting of its speed.
    kept = {name: each for name, each in inherited.items() if name == "JAX_PLATFORMS" or not name.startswith(DROPPED)}
    return {
        **kept,
        **threads(count),
        # Sides share an accelerator.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **own,
        # The library of the measured side is that of this checkout.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH")))),
    }


class Child:
    """A running side."""

    def __init__(self, launch: Launch, cores: Sequence[int]) -> None:
        """Start the process on the given cores; it prepares while this call returns."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        variables = environment(os.environ, launch.case.get("environment", {}), len(cores))
        with _on(cores):
            self._process = subprocess.Popen(
                [launch.python, "-m", f"{PACKAGE}.{launch.module}", json.dumps(dict(launch.case))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
                env={**variables, STARTED: repr(time.time())},
            )

    def answer(self) -> dict[str, Any]:
        """Return the next line of the process; raises `Failed` with its last error line if there is none."""
        assert self._process.stdout is not None, "a pipe"
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()][-12:]
            raise Failed("\n".join([f"exit status {status}", *last]))
        return json.loads(line)

    def measure(self) -> dict[str, float]:
        """Return the figures of one more round."""
        assert self._process.stdin is not None, "a pipe"
        # A process that is gone says so in its answer.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


@contextlib.contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread on the given cores within the block: a process that it starts inherits them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def started(launch: Launch, cores: Sequence[int]) -> Iterator[Child]:
    """Yield a running side; it ends with the block, also on an error."""
    child = Child(launch, cores)
    try:
        yield child
    finally:
        child.close()


def order(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: forward and backward in turn, so that a steady drift favours no side."""
    return [*names] if number % 2 == 0 else [*names][::-1]


def measure(
    launches: Mapping[str, Launch],
    *,
    pairs: int,
    cores: Sequence[int],
    fresh: bool,
    together: bool = False,
    tolerance: float,
) -> dict[str, dict[str, Any]]:
    """Measure a case in ``pairs`` rounds of all sides.

    Args:
      launches: by side; the first is this library.
      pairs: rounds.
      cores: the cores of every side.
      fresh: every round of a side is a new process, after one process whose figures are left out and whose case has
        ``check``; else the process of a side lives through all rounds.
      together: the sides prepare at the same time, for a machine with cores and memory for all of them; else in turn.
      tolerance: of `check`.

    Returns:
      by side ``{"facts", "check", "rounds": [figures]}`` or, for a side that failed, ``{"error"}``. A side that fails takes
      part in no further round.
    """
    done: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        running: dict[str, Child] = {}
        if together:
            running = {name: stack.enter_context(started(launch, cores)) for name, launch in launches.items()}
        for name, launch in launches.items():
            with _recorded(done, name):
                if fresh:
                    with started(launch._replace(case={**launch.case, "check": True}), cores) as child:
                        done[name] = {**child.answer(), "rounds": []}
                else:
                    if not together:
                        running[name] = stack.enter_context(started(launch, cores))
                    done[name] = {**running[name].answer(), "rounds": []}
        _compare(done, tolerance)
        for number in range(pairs):
            for name in order([name for name, side in done.items() if "error" not in side], number):
                with _recorded(done, name):
                    if fresh:
                        with started(launches[name], cores) as child:
                            child.answer()
                            figures = child.measure()
                    else:
                        figures = running[name].measure()
                    done[name]["rounds"].append(figures)
    return done


@contextlib.contextmanager
def _recorded(done: dict[str, dict[str, Any]], name: str) -> Iterator[None]:
    """Put the error of a side that fails in its place."""
    try:
        yield
    except Failed as error:
        done[name] = {"error": str(error)}


def _compare(done: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Replace each side that computes other numbers than the first by an error."""
    first = next(iter(done.values())).get("check", {})
    for name, side in done.items():
        if difference := check(first, side.get("check", {}), tolerance):
            done[name] = {"error": f"computes other numbers than {next(iter(done))}: {difference}"}


def check(first: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> str:
    """Return the first difference between two sets of numbers by name, "" for none.

    Names of one set only are left out; two sets that share none are not compared, which is a difference too.

    Floats may differ by ``tolerance`` times the largest magnitude of their name, or times 1 where this is smaller; integers
    must be equal. The name ``tokens`` is of texts that are chosen greedily, whose rows may part at a near tie (`parting`).
    """
    if first and other and not first.keys() & other.keys():
        return f"no number in common: {', '.join(sorted(other))}; of the first side: {', '.join(sorted(first))}"
    for name in sorted(first.keys() & other.keys() - {"margins"}):
        if name == "tokens" and "margins" in first:
            if parted := parting(first["tokens"], other["tokens"], first["margins"], tolerance):
                return parted
            continue
        ours, theirs = _flat(first[name]), _flat(other[name])
        if len(ours) != len(theirs):
            return f"{name}: {len(ours)} numbers and {len(theirs)}"
        exact = all(isinstance(each, int) for each in (*ours, *theirs))
        limit = 0.0 if exact else tolerance * max([1.0, *map(abs, ours)])
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        # A comparison with a number that is not finite is false.
        if not all(gap <= limit < math.inf for gap in gaps):
            return f"{name}: differs by {max(gaps):.3g}, more than {limit:.3g}"
    return ""


def parting(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
    tolerance: float,
) -> str:
    """Return the first step at which a greedy text differs without a near tie, "" for none.

    Both sides have the same logits up to ``tolerance`` until the rows part, so the two highest logits are there at most twice
    as far apart. Later tokens follow other texts, and are not compared.

    Args:
      ours: tokens (rows, steps).
      theirs: tokens (rows, steps).
      margins: (rows, steps): the highest logit less the second, before each of our tokens.
      tolerance: of a logit.
    """
    if [len(row) for row in ours] != [len(row) for row in theirs]:
        return f"tokens: {len(_flat(ours))} numbers and {len(_flat(theirs))}"
    for row, (a, b, between) in enumerate(zip(ours, theirs, margins, strict=True)):
        step = next((step for step, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
        # A margin that is not finite is no near tie.
        if step is not None and not between[step] <= 2 * tolerance:
            return f"tokens: row {row} differs at step {step}, where the margin of the logits is {between[step]:.3g}"
    return ""


def _flat(value: Any) -> list[Any]:
    return [number for item in value for number in _flat(item)] if isinstance(value, list) else [value]
