"""The JAX processes of one job, one a host: how they find each other, agree, wait, and bring together what they hold.

Every process runs the same command with the same input. With one process, which is no job, all of this does nothing.
"""

import argparse
import contextlib
import importlib.metadata
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsee_jax.errors import InputError

SILENCE = 60
"""Seconds without a sign of life after which a process counts as lost, and the others end."""

PIECE = 4 << 20
"""Bytes of each process that are gathered at a time."""

T = TypeVar("T")

_LOST = re.compile("^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |Gloo|CoordinationService|remote process")
"""In messages of the runtime, those of collectives and of the coordinator, where another process does not answer."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `join` reads."""
    group = parser.add_argument_group(
        "several processes", "Each host of a job runs this command, on a disk that all of them share."
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of this job, which a TPU pod, SLURM, Kubernetes or Open MPI tells of, or "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 can be reached; implies --distributed"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, 0 to N - 1")


def join(options: argparse.Namespace) -> None:
    """Join the job that the flags of `arguments` name, before anything else asks JAX for a device.

    Raises:
      InputError: nothing tells of a job, the flags contradict each other, or the processes run different versions.
    """
    flags = (options.coordinator, options.processes, options.process)
    if not options.distributed and not any(flag is not None for flag in flags):
        return
    coordinator, count, number = flags
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    number = _number("JAX_PROCESS_ID") if number is None else number
    if count is not None and number is not None and not 0 <= number < count:
        raise InputError(f"--process is {number} of --processes {count}; use 0 to {count - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator is {coordinator!r}; expected HOST:PORT")
    try:
        jax.distributed.initialize(
            *(coordinator, count, number), heartbeat_timeout_seconds=SILENCE, shutdown_timeout_seconds=SILENCE
        )
    except ValueError as error:
        raise InputError(
            f"--distributed: nothing here tells of a job ({error}): give --coordinator=HOST:PORT --processes=N --process=I"
        ) from None
    others = {name: importlib.metadata.version(name) for name in ("jaxlib", "flax", "optax", "orbax-checkpoint")}
    assert_equal("versions", {"jax": jax.__version__, **others})


@contextlib.contextmanager
def exit_on_failure(*expected: type[Exception]) -> Iterator[None]:
    """End this process of a job at once where what runs within fails, but for the errors ``expected``.

    On its way out it would wait for the others, which wait for it. Where it fails because another process is gone, one line
    on stderr says so.
    """
    try:
        yield
    except Exception as error:
        if not is_distributed() or isinstance(error, expected):
            raise
        if _LOST.search(str(error)):
            said = f"another one is gone or cannot be reached ({str(error).splitlines()[0]})"
        else:
            traceback.print_exc()
            said = "an error"
        line = (
            f"process {jax.process_index()} of {jax.process_count()} stops: {said}; start all of them again, they go on"
        )
        print(f"{line} from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """Where what runs within raises `InputError` on one process, raise it on all; nothing within may wait for others."""
    mine = None
    try:
        yield
    except InputError as error:
        mine = error
    said = allgather_objects(mine and str(mine))
    if mine:
        raise mine
    for number, text in enumerate(said):
        if text:
            raise InputError(f"process {number} of this job: {text}")


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{name} is {text!r} in the environment; expected a number")
    return int(text)


def is_distributed() -> bool:
    """Tell whether there is more than one process."""
    # Without a job nobody is asked: that would take hold of the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Tell whether this is process 0, which alone writes files and talks."""
    return not is_distributed() or jax.process_index() == 0


def owns(number: int) -> bool:
    """Return whether the piece of work of that number is this process's."""
    return not is_distributed() or number % jax.process_count() == jax.process_index()


def barrier(what: str) -> None:
    """Wait until every process is here; ``what`` names the place."""
    if is_distributed():
        multihost_utils.sync_global_devices(what)


def allgather_objects(value: Any) -> list[Any]:
    """Return what each process says, process 0 first; any values that can be pickled."""
    if not is_distributed():
        return [value]
    # As bytes: through JAX, float64 would come back as float32.
    told = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(told.size))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: told.size] = told
    # It goes through the devices, whose memory others need.
    pieces = [multihost_utils.process_allgather(padded[at : at + PIECE]) for at in range(0, padded.size, PIECE)]
    every = np.concatenate(pieces, axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def map_shards(count: int, work: Callable[[slice], T]) -> list[T]:
    """Return ``work(part)`` of all parts of ``count`` things, in their order: each process does one of them.

    Raises:
      InputError: on all processes, what ``work`` raises on one.
    """
    if not is_distributed():
        return [work(slice(0, count))]
    number, processes = jax.process_index(), jax.process_count()
    found = None
    with raise_on_all():
        part = slice(count * number // processes, count * (number + 1) // processes)
        found = work(part) if part.start < part.stop else None
    return [part for part in allgather_objects(found) if part is not None]


def gather(found: list[Any]) -> list[Any]:
    """Return the results of all processes from each one's share (see `owns`), in which None stands for another's."""
    shares = allgather_objects(found)
    return [shares[number % len(shares)][number] for number in range(len(found))]


def assert_equal(what: str, mine: Mapping[str, Any]) -> None:
    """Raise `InputError`, on every process, unless all of them have equal ``owns``; ``what`` names it."""
    ours, *others = allgather_objects(dict(mine))
    for number, theirs in enumerate(others, 1):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"process {number} of this job differs from process 0 in its {what}: {key} is {theirs.get(key)!r} there "
                    f"and {ours.get(key)!r} here; start all processes with the same"
                )


def to_host(values: Any) -> Any:
    """Return a tree as NumPy arrays, which on CPU are views of the arrays there are.

    What lies on several processes is gathered leaf by leaf, on each of them: all must call this.
    """

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, values)
