"""The folder that a merge writes into, which becomes the output when it is complete."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsee_jax import processes
from dsee_jax.errors import InputError

STAMP = "merge.json"
"""In the folder: which merge it is the beginning of."""


@contextlib.contextmanager
def opened(folder: Path, stamp: str, nbytes: int) -> Iterator[None]:
    """Go on in the folder if it is the beginning of the same merge, else begin it anew; drop it when it cannot be finished.

    Args:
      folder: beside the output.
      stamp: what tells one merge from another.
      nbytes: of the merged model.

    Raises:
      InputError: the disk is too small, or turns out to be.
    """
    if processes.first() and not _continues(folder, stamp):
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if nbytes > free:
            raise InputError(
                f"{folder.parent} has {free / 1e9:.2f} GB free; the merged model takes {nbytes / 1e9:.2f} GB: "
                "make room, or write elsewhere"
            )
        folder.mkdir()
        (folder / STAMP).write_text(json.dumps({"stamp": stamp}))
    processes.together("the unfinished folder is there")
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


def _continues(folder: Path, stamp: str) -> bool:
    try:
        return json.loads((folder / STAMP).read_text())["stamp"] == stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finish(folder: Path, out: Path) -> None:
    """Give the finished folder the output's name, on the disk when this returns."""
    (folder / STAMP).unlink()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":  # those are synced
            _sync(path)
    _sync(folder)
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    folder.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
