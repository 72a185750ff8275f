"""Folders that are whole or not there."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsee_jax.errors import InputError


@contextlib.contextmanager
def whole(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``path`` to write into; it becomes ``path`` at the end, and goes if anything fails.

    Args:
      path: the folder to make; its parents are made too.
      overwrite: replace what stands there.

    Raises:
      InputError: ``path`` exists and is not an empty folder (without ``overwrite``).
    """
    path = path.expanduser().absolute()
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists: give a new folder, or pass overwrite=True")
    staging, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run has left
    staging.mkdir(parents=True)
    try:
        yield staging
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
