"""The staging folder that a merge writes into; it survives a crash, and is renamed to the output when complete."""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, console, multihost

STAMP = "merge.json"
"""The file in the folder that identifies its merge."""

FILES = (STAMP, "*.done", ".model*.safetensors.partial")
"""Patterns of the files in the folder beside those of the output."""


@contextlib.contextmanager
def opened(folder: Path, stamp: str, nbytes: int) -> Iterator[None]:
    """Resume in the folder if it belongs to the same merge, else clear it; delete it on an `InputError` or a full disk.

    Args:
      folder: the staging folder, beside the output.
      stamp: a digest that identifies the merge.
      nbytes: the size of the merged model.

    Raises:
      InputError: the disk is too small, or becomes full.
    """
    if multihost.is_main() and not _resumes(folder, stamp):
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if nbytes > free:
            raise InputError(
                f"{folder.parent} has {console.size(free)} free; the merged model takes {console.size(nbytes)}: "
                "make room, or write elsewhere"
            )
        folder.mkdir()
        (folder / STAMP).write_text(json.dumps({"stamp": stamp}))
    multihost.barrier("the staging folder exists")
    try:
        yield
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"{folder.parent} is full: make room, or write elsewhere") from None


def _resumes(folder: Path, stamp: str) -> bool:
    try:
        return json.loads((folder / STAMP).read_text())["stamp"] == stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finish(folder: Path, out: Path) -> None:
    """Rename the complete folder to the output, after a sync of all its files."""
    for mark in folder.glob("*.done"):
        mark.unlink()
    (folder / STAMP).unlink()
    atomic.replace_folder(folder, out)
