"""One shard being written: tensors at their places in any order, synced as it grows, renamed when it is whole."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dsee_jax.ckpt import tensors

_BLOCK = 1 << 20

PAUSE = 0.2
"""Seconds between two syncs of what is written: the disk is busy from the start, and the last sync has little left to do."""


class Shard(NamedTuple):
    """A file of tensors that is not whole yet."""

    path: Path  # what it is called when it is
    descriptor: int
    offsets: Mapping[str, int]  # where each tensor's bytes begin
    ends: Mapping[str, int]
    written: threading.Event  # there is nothing more to come
    syncer: threading.Thread

    def sink(self, name: str, advance: Callable[[int], None]) -> Callable[[int, np.ndarray], None]:
        """Return what writes a stretch of the tensor ``name`` from a flat position on, and tells ``advance`` its bytes."""
        offset = self.offsets[name]

        def write(position: int, stretch: np.ndarray) -> None:
            data, at = stretch.view(np.uint8).data, offset + position * stretch.itemsize
            while data:
                done = os.pwrite(self.descriptor, data, at)
                data, at = data[done:], at + done
            advance(stretch.nbytes)

        return write

    def close(self, parts: Mapping[str, Future[Any]]) -> None:
        """Wait for the tensors, ``{name: future}`` in the file's order, sync, and rename; what went wrong is raised here."""
        digest = hashlib.sha256()
        try:
            with _unfinished(self.path).open("rb", buffering=0) as file:
                for name, part in parts.items():
                    part.result()
                    # Each tensor is read back while it is in memory; what stands before the first is the header.
                    _update(digest, file, self.ends[name])
                self.written.set()
        finally:
            self.abandon()
        _unfinished(self.path).replace(self.path)
        mark(self.path).write_text(json.dumps({"sha256": digest.hexdigest()}))

    def abandon(self) -> None:
        """Close the file; again does nothing."""
        self.written.set()
        self.syncer.join()


def create(path: Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shard:
    """Return a new file for arrays ``{name: (type, shape)}``, its room on the disk taken.

    Raises:
      OSError: there is no room for it.
    """
    begin, offsets, size = tensors.header(arrays)
    descriptor = os.open(_unfinished(path), os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, begin, 0)
    except BaseException:
        os.close(descriptor)
        raise
    written = threading.Event()
    syncer = threading.Thread(target=_sync, args=(descriptor, written), daemon=True)
    syncer.start()
    ends = dict(zip(offsets, [*list(offsets.values())[1:], size], strict=True))
    return Shard(path, descriptor, offsets, ends, written, syncer)


def finished(path: Path) -> bool:
    """Return whether an earlier merge left this shard whole: its bytes are those that it wrote."""
    try:
        return json.loads(mark(path).read_text())["sha256"] == _digest(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark(path: Path) -> Path:
    """Return the file that says that a shard is whole; it does not belong in an output."""
    return path.with_name(path.name + ".done")


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _update(digest: Any, file: BinaryIO, end: int) -> None:
    """Hash on from where ``file`` stands to ``end``."""
    left = end - file.tell()
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)


def _sync(descriptor: int, written: threading.Event) -> None:
    try:
        while not written.wait(PAUSE):
            os.fdatasync(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
