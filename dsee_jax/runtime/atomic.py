"""Write a file or a folder of this machine completely, or not at all.

The content goes to a hidden path beside the target, is synced to the disk, and is then renamed. A crash at any moment leaves
the former content of the target or the new content. A folder takes two renames: a crash between them leaves the former
content at ``.NAME.old``, from where the next writer of the folder restores it.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def hidden(path: Path, suffix: str = "partial") -> Path:
    """Return the hidden path beside ``path``: ``.NAME.partial``, which holds the content until it is complete."""
    return path.with_name(f".{path.name}.{suffix}")


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Name ``path`` in an error of the system that names no file, such as a full disk in the middle of a write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write a file to; the file replaces ``path`` at the end, and is deleted on an error.

    Each writer has a path of its own: of two writers at once, the file of the later one stays, complete.
    """
    partial = hidden(path, f"{uuid.uuid4().hex[:8]}.partial")
    try:
        with named(path):
            yield partial
            replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder; it replaces ``path`` at the end, and is deleted on an error. Parents are created."""
    path = path.absolute()
    partial = hidden(path)
    _restore(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    try:
        with named(path):
            yield partial
            replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_file(partial: Path, path: Path) -> None:
    """Sync a complete file, and rename it to ``path``."""
    _sync(partial)
    partial.replace(path)


def replace_folder(partial: Path, path: Path) -> None:
    """Sync a complete folder, and rename it to ``path``; a folder at ``path`` is deleted after the rename."""
    for each in (*partial.rglob("*"), partial):
        _sync(each)
    _restore(path)
    old = hidden(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.replace(old)
    try:
        partial.replace(path)
    except BaseException:
        _restore(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _restore(path: Path) -> None:
    """Rename the former folder back to ``path`` where a crash left nothing there."""
    old = hidden(path, "old")
    if old.exists() and not path.exists():
        old.replace(path)


def _sync(path: Path) -> None:
    """Wait until the disk holds the bytes of a file, or the entries of a folder."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows cannot open a folder
        return
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
