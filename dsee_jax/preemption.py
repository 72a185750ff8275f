"""SIGTERM, by which a scheduler says that it is about to take the machine away."""

import contextlib
import signal
import threading
from collections.abc import Iterator

STATUS = 128 + signal.SIGTERM
"""Exit status of a command that stopped for it, as a shell gives one that died of it: the work is not done."""

_asked = threading.Event()


class Preempted(Exception):
    """A run was told to stop, and has saved what it needs to go on; the message says where it stands."""


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Take note of SIGTERM instead of dying of it; a second one kills. Only the main thread of a process can."""
    if threading.current_thread() is not threading.main_thread():
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
    """Tell whether SIGTERM came since `noticed` began."""
    return _asked.is_set()
