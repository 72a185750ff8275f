"""The limits of this process on open files and address space (``ulimit -n``, ``ulimit -v``)."""

import os

from dsee_jax.errors import InputError
from dsee_jax.runtime import console

_OTHER_FILES = 8
"""Open files beside those that are open already and those that a command counts."""

_WORKING = (1 << 30) + (os.cpu_count() or 1) * (256 << 20)
"""Bytes of address space for the buffers, stacks and heaps of threads, beside mapped files."""


def check(*, open_files: int, mapped: int) -> None:
    """Raise the limit on open files as far as the system allows, and check both limits.

    Args:
      open_files: the most files that the work has open at once.
      mapped: bytes of the files that it maps into memory.

    Raises:
      InputError: a limit is too low; the message says the command that raises it.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limits
        return
    needed = _opened() + open_files + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InputError(
                f"{needed} files must be open at once, and the limit is {hard}; raise it: ulimit -n {needed}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY and (total := used() + mapped + _WORKING) > space:
        raise InputError(
            f"the work takes {console.size(total)} of address space, files mapped into memory included, and the limit is "
            f"{console.size(space)}; raise it: ulimit -v unlimited"
        )


def _opened() -> int:
    """Return the number of files that this process has open now; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def used() -> int:
    """Return the address space of this process in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as pages:
            return int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
