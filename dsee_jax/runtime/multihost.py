"""The JAX processes of one distributed job, one per host: joining, barriers, all-gathers, equality checks, errors.

Every process runs the same command with the same input. In a single process every function here returns at once.
"""

import argparse
import contextlib
import importlib.metadata
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsee_jax.errors import InputError
from dsee_jax.runtime import job, messages
from dsee_jax.runtime.storage import StoreError

HEARTBEAT = 60
"""Seconds without a heartbeat after which a process counts as lost, and the other processes end."""

SAID = 10
"""Seconds after which a process that waits for the start of all others says so."""

PIECE = 4 << 20
"""Bytes of each process in one all-gather."""

T = TypeVar("T")

_LOST = re.compile("^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |Gloo|CoordinationService|remote process")
"""Matches the errors of collectives and of the coordinator when another process does not answer."""


def join(options: argparse.Namespace) -> None:
    """Join the job that the flags of `job.arguments` name; call this before anything asks JAX for a device.

    Raises:
      InputError: no job is announced, the flags contradict each other, or the processes run different versions.
    """
    if not job.is_named(options):
        return
    coordinator, count, number = options.coordinator, options.processes, options.process
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    number = _number("JAX_PROCESS_ID") if number is None else number
    if count is not None and number is not None and not 0 <= number < count:
        raise InputError(f"--process is {number} of --processes {count}; use 0 to {count - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(f"--coordinator is {coordinator!r}; expected HOST:PORT")
    if not 0 < options.join_timeout < threading.TIMEOUT_MAX:
        raise InputError(f"--join-timeout is {options.join_timeout}; expected a number of seconds above 0")
    try:
        with _waiting(coordinator or "the address of the job", options.join_timeout):
            jax.distributed.initialize(
                *(coordinator, count, number),
                initialization_timeout=int(options.join_timeout) + HEARTBEAT,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
    except ValueError as error:
        raise InputError(
            f"--distributed: no job is announced here ({error}): give --coordinator=HOST:PORT --processes=N --process=I"
        ) from None
    others = {name: importlib.metadata.version(name) for name in ("jaxlib", "flax", "optax", "orbax-checkpoint")}
    assert_equal("versions", {"jax": jax.__version__, **others})


@contextlib.contextmanager
def _waiting(address: str, limit: float) -> Iterator[None]:
    """Say so where the body waits for other processes, and end this process after ``limit`` seconds; JAX would abort it."""

    def say() -> None:
        print(f"waiting for the other processes at {address}, at most {limit:g} s", file=sys.stderr, flush=True)

    def leave() -> None:
        line = f"the job at {address} did not start in {limit:g} s: start all its processes, and check that this host "
        print(f"{line}reaches the address; --join-timeout=SECONDS waits longer", file=sys.stderr, flush=True)
        os._exit(1)

    timers = [threading.Timer(seconds, function) for seconds, function in ((SAID, say), (limit, leave))]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


@contextlib.contextmanager
def exit_on_failure(*expected: type[Exception]) -> Iterator[None]:
    """End this process of a job at once on any error in the body, except the errors ``expected``.

    A normal exit would wait for the other processes, which wait for this one. If the cause is the loss of another process,
    one line on stderr says so; else the traceback is printed.
    """
    try:
        yield
    except Exception as error:
        if not is_distributed() or isinstance(error, expected):
            raise
        # The loss of a process may also show in the save of a checkpoint.
        if _LOST.search(str(error)):
            cause = f"another process is lost or cannot be reached ({str(error).splitlines()[0]})"
        elif isinstance(error, StoreError):
            cause = str(error)
        elif isinstance(error, OSError) and error.filename:
            cause = f"{error.filename}: {error.strerror}"
        else:
            traceback.print_exc()
            cause = "an error"
        line = f"process {jax.process_index()} of {jax.process_count()} stops: {cause}; start all processes again"
        print(f"{line}, they resume from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)


@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """If the body raises `InputError` on one process, raise it on all; the body must not wait for other processes."""
    own = None
    try:
        yield
    except InputError as error:
        own = error
    texts = allgather_objects(own and str(own))
    if own:
        raise own
    for number, text in enumerate(texts):
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
    """Return whether this process belongs to a job of several processes."""
    # The first condition avoids process_count, which would initialise the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Return whether this is process 0, the only process that writes files and prints."""
    return not is_distributed() or jax.process_index() == 0


def owns(number: int) -> bool:
    """Return whether this process does the piece of work ``number``."""
    return not is_distributed() or number % jax.process_count() == jax.process_index()


def barrier(name: str) -> None:
    """Wait until every process reaches the barrier ``name``."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def allgather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, process 0 first; any types of `dsee_jax.runtime.messages`."""
    if not is_distributed():
        return [value]
    # As bytes, because JAX would turn float64 into float32.
    data = np.frombuffer(messages.pack(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: data.size] = data
    # In pieces, because an all-gather takes memory of the devices.
    pieces = [multihost_utils.process_allgather(padded[at : at + PIECE]) for at in range(0, padded.size, PIECE)]
    every = np.concatenate(pieces, axis=1)
    return [messages.unpack(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def map_shards(count: int, work: Callable[[slice], T]) -> list[T]:
    """Split ``count`` items into one slice per process; return ``work(slice)`` of all processes, in the order of the items.

    Raises:
      InputError: on all processes, if ``work`` raises it on one.
    """
    if not is_distributed():
        return [work(slice(0, count))]
    number, processes = jax.process_index(), jax.process_count()
    result = None
    with raise_on_all():
        part = slice(count * number // processes, count * (number + 1) // processes)
        result = work(part) if part.start < part.stop else None
    return [result for result in allgather_objects(result) if result is not None]


def gather(share: list[Any]) -> list[Any]:
    """Return the results of all processes; each passes a list with its own results (see `owns`) and None for the others."""
    shares = allgather_objects(share)
    return [shares[number % len(shares)][number] for number in range(len(share))]


def assert_equal(name: str, values: Mapping[str, Any]) -> None:
    """Raise `InputError` on every process unless all processes pass equal ``values``; ``name`` is for the message."""
    first, *others = allgather_objects(dict(values))
    for number, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise InputError(
                    f"process {number} of this job differs from process 0 in its {name}: {key} is {other.get(key)!r} there "
                    f"and {first.get(key)!r} here; start all processes with the same"
                )


def to_host(values: Any) -> Any:
    """Return a tree as NumPy arrays; on the CPU they are views of the JAX arrays.

    A leaf that is sharded over processes is all-gathered: all processes must call this function.
    """

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, values)
