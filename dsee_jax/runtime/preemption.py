"""SIGTERM, by which a scheduler says that it is about to take the machine away.

In a job of several processes it may come to one of them, or to each at its own moment: JAX's runtime takes note of it and
tells all of them at which step to stop.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

from jax.experimental import multihost_utils

from dsee_jax.runtime import multihost

STATUS = 128 + signal.SIGTERM
"""Exit status of a command that stopped for it, as a shell gives one that died of it: the work is not done."""

_asked = threading.Event()
_numbers = itertools.count(1)


class Preempted(Exception):
    """A run was told to stop, and has saved what it needs to go on; the message says where it stands."""


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Take note of SIGTERM instead of dying of it; a second one kills. Only the main thread of a process can."""
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
    """Tell whether to stop: SIGTERM came since `noticed` began.

    All processes of a job ask after each step, equally often, and are told the same.
    """
    if not multihost.is_distributed():
        return _asked.is_set()
    # They agree on the number that comes after the largest asked with so far; one that is left out would be missed.
    return multihost_utils.reached_preemption_sync_point(next(_numbers))
