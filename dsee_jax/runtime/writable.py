"""Paths of this machine where a file or folder can be written; checked before any work, so that no work is lost at its end."""

import os
import shutil
from pathlib import Path

from dsee_jax.errors import InputError
from dsee_jax.runtime.atomic import hidden

LONGEST = "model-00001-of-00001.safetensors.partial"
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
        (hidden(path) / LONGEST).lstat()
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


def check_folder(path: Path, option: str, longest: str) -> None:
    """Raise `InputError` unless the folder ``path`` can be created, with its parents, or written where it exists.

    Args:
      path: of this machine.
      option: the flag or key that names it; begins the message.
      longest: a long name of a file in the folder.
    """
    path = path.absolute()
    try:
        (path / longest).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option} {str(path)[:_SHOWN]}: {reason}; give a shorter or plainer path") from None
    place = next(place for place in (path, *path.parents) if place.is_symlink() or place.exists())
    if not place.exists():
        raise InputError(
            f"{option} {path}: {place} is a symlink to nothing ({os.readlink(place)}); name another folder"
        )
    if not place.is_dir():
        raise InputError(f"{option} {path}: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {place} is read-only for you; name a folder that you may write")


def check_space(folder: Path, size: int, option: str) -> None:
    """Raise `InputError` if the disk of ``folder`` has less than ``size`` bytes free."""
    usage = shutil.disk_usage(
        next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    )
    if usage.total and usage.free < size:  # some network file systems count nothing
        raise InputError(
            f"{option} {folder}: needs about {size / 2**20:,.0f} MiB, and its disk has {usage.free / 2**20:,.0f} MiB free; "
            "make room, or name a folder on another disk"
        )
