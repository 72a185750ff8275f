"""Paths of this machine where a file or folder can be written; checked before any work, so that no work is lost at its end."""

import os
from pathlib import Path

from dsee_jax.errors import InputError
from dsee_jax.runtime.atomic import hidden

_LONGEST = "model-00001-of-00001.safetensors.partial"
"""A long name of a file in an output folder."""

_SHOWN = 300
"""The most characters of a path that is too long."""


def check(path: Path, option: str) -> None:
    """Raise `InputError` unless a file or a folder can be created at ``path``, by way of its hidden path (`atomic.hidden`).

    Args:
      path: of this machine; it need not exist.
      option: the flag or argument that names the path, such as ``OUT_DIR``; begins the message.
    """
    path = path.absolute()
    parent = path.parent
    try:
        (hidden(path) / _LONGEST).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
        raise InputError(f"{option} {shown}: {reason}; give a shorter or plainer path") from None
    if not parent.is_dir():
        found = "is a file" if parent.is_file() else "does not exist"
        raise InputError(f"{option} {path}: the folder {parent} {found}; create it first, or name another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {parent} is read-only for you; name a path in a folder that you may write")
