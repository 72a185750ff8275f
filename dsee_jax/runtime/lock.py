"""One writer of a folder at a time: a lock beside the folder, which the system frees when its process ends or dies."""

import contextlib
import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from dsee_jax.errors import InputError
from dsee_jax.runtime.atomic import hidden

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""The errors of file systems without locks, such as some that are mounted from a network."""


@contextlib.contextmanager
def held(folder: Path, writer: str) -> Iterator[None]:
    """Hold the lock of ``folder`` while another command would write the same files.

    The lock is the empty file ``.NAME.lock`` beside the folder; where the place beside it cannot be written, it is a file of
    the same path's digest in the folder for temporary files. Both stay: deleting a lock file would let two processes in.

    Args:
      folder: the folder that is written; it need not exist, its parent must.
      writer: the command, for the error, such as ``merge``.

    Raises:
      InputError: another process holds the lock.
    """
    folder = folder.resolve()
    lock = filelock.FileLock(_file(folder))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(
            f"{folder}: another {writer} writes this folder now; wait for its end, or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s): let no other %s write it", folder, error.strerror, writer)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _file(folder: Path) -> Path:
    if os.access(folder.parent, os.W_OK | os.X_OK):
        return hidden(folder, "lock")
    return Path(tempfile.gettempdir()) / f"dsee_jax_{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}.lock"
