"""SIGTERM, by which a scheduler takes the machine away, and SIGINT (Ctrl-C): a run saves its step and leaves.

Neither interrupts the Python of a run: after an exception while a checkpoint is written, XLA and TensorStore may hang or crash
at the end of the interpreter. In a job, the signals may reach one process or all, at different times. JAX's runtime notices
SIGTERM, and tells all processes the same step to stop at.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from jax.experimental import multihost_utils

from dsee_jax.errors import Stopped
from dsee_jax.runtime import multihost

GRACE = 60
"""Seconds after SIGINT within which a run must leave. A scheduler that sends SIGTERM has a limit of its own."""

_asked: list[int] = []
"""The signals since `noticed` began."""

_numbers = itertools.count(1)


class Preempted(Stopped):
    """SIGTERM or SIGINT stopped the work, which can go on; the exit status is that of a shell for the signal."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        """Take the line for a person, and the signal."""
        super().__init__(message)
        self.status = 128 + number


def stopped(step: str) -> Preempted:
    """Return the error of a run that a signal stopped after it saved ``step``, such as ``step 3 of 10 of stage tune``."""
    number = _asked[0] if _asked else signal.SIGTERM  # of another process of the job
    return Preempted(f"{signal.Signals(number).name}: saved at {step}; the same command resumes from there", number)


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Notice SIGTERM and SIGINT instead of dying; works in the main thread only.

    A second signal ends the process at once, and so does SIGINT after `GRACE` seconds. A signal that is ignored when this
    begins, as in a background job, stays ignored.

    Raises:
      Preempted: a signal came, and the body ended without asking for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT] if multihost.is_distributed() else [signal.SIGINT, signal.SIGTERM]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _asked.clear()
    before = {number: signal.signal(number, lambda number, frame: _asked.append(number)) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, numbers), daemon=True).start()
    try:
        yield
        if _asked and not multihost.is_distributed():
            raise stopped("the last step")
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        _asked.clear()


def _watch(reader: socket.socket, numbers: list[signal.Signals]) -> None:
    """End the process at the second signal, and `GRACE` seconds after SIGINT, until the other end of ``reader`` closes.

    Python calls the handler of a signal only after a compilation or a step has returned; this thread reads it at once.
    """
    with reader:
        first = _next(reader, numbers)
        if first is None:
            return
        if first == signal.SIGINT:
            reader.settimeout(GRACE)
        if multihost.is_distributed():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX's runtime notices
        try:
            second = _next(reader, numbers)
        except TimeoutError:
            _leave(first, f"the step and its checkpoint took more than {GRACE} s")
        if second is not None:
            _leave(second, "stopped at once")


def _next(reader: socket.socket, numbers: list[signal.Signals]) -> int | None:
    """Wait for a signal of ``numbers`` and return it; None at the end."""
    while data := reader.recv(1):
        if data[0] in numbers:
            return data[0]
    return None


def _leave(number: int, reason: str) -> NoReturn:
    line = f"{signal.Signals(number).name}: {reason}; the same command resumes from the last checkpoint\n"
    os.write(2, f"{os.path.basename(sys.argv[0])}: {line}".encode())
    os._exit(128 + number)


def asked() -> bool:
    """Return whether to stop: a signal came since `noticed` began.

    Every process of a job must call this after each step; all processes get the same answer.
    """
    if not multihost.is_distributed():
        return bool(_asked)
    # The processes agree on a number above every number asked so far; a skipped number would miss the agreement.
    return multihost_utils.reached_preemption_sync_point(next(_numbers))


class _Terminated(BaseException):
    pass


@contextlib.contextmanager
def raised(resume: str) -> Iterator[None]:
    """Let SIGTERM interrupt the body as Ctrl-C does, and raise `Preempted`; for work in one process without steps.

    A second SIGTERM kills the process. Ctrl-C raises `KeyboardInterrupt`, also where it would kill the process. Works in the
    main thread only.

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

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except _Terminated:
        raise Preempted(f"terminated; {resume}") from None
    finally:
        signal.signal(signal.SIGTERM, before)
