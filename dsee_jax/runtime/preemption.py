"""SIGTERM, the signal by which a scheduler announces that it takes the machine away.

In a job, the signal may reach one process or all, at different times. JAX's runtime notices it, and tells all processes the
same step to stop at.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

from jax.experimental import multihost_utils

from dsee_jax.errors import Stopped
from dsee_jax.runtime import multihost

STATUS = 128 + signal.SIGTERM
"""The exit status of a preempted command, equal to a shell's status for a process that SIGTERM killed."""

_asked = threading.Event()
_numbers = itertools.count(1)


class Preempted(Stopped):
    """A run stopped on SIGTERM, after it saved a checkpoint; the message says the step and the stage."""

    status = STATUS


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Notice SIGTERM instead of dying; a second SIGTERM kills the process. Works in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or multihost.is_distributed():
        yield
        return
    _asked.clear()

    def note(number: int, frame: object) -> None:
        del number, frame
        _asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()


def asked() -> bool:
    """Return whether to stop: SIGTERM came since `noticed` began.

    Every process of a job must call this after each step; all processes get the same answer.
    """
    if not multihost.is_distributed():
        return _asked.is_set()
    # The processes agree on a number above every number asked so far; a skipped number would miss the agreement.
    return multihost_utils.reached_preemption_sync_point(next(_numbers))


class _Terminated(BaseException):
    pass


@contextlib.contextmanager
def raised(resume: str) -> Iterator[None]:
    """Let SIGTERM interrupt the body as Ctrl-C does, and raise `Preempted`; for work in one process without steps.

    A second SIGTERM kills the process. Works in the main thread only.

    Args:
      resume: how to go on; the end of the message.
    """
    if threading.current_thread() is not threading.main_thread() or multihost.is_distributed():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except _Terminated:
        raise Preempted(f"terminated; {resume}") from None
    finally:
        signal.signal(signal.SIGTERM, before)
