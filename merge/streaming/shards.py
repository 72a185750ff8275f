"""Writing one shard: chunks of tensors in any order are gathered into blocks, which bypass the page cache (O_DIRECT).

Through the page cache, a model larger than the limit on dirty pages is written half as fast, and reaches the disk late. On a
file system without O_DIRECT every block is synced.
"""

import errno
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt import tensors
from dsee_jax.runtime import atomic

BLOCK = 8 << 20
"""Bytes written at once; offsets in memory and in the file are multiples of a page."""

WAITING = 8
"""Blocks that may wait for the disk; a thread with a further block waits."""

_PAGE = 4096


class _Block(NamedTuple):
    """A block being filled."""

    data: np.ndarray  # uint8 (BLOCK,)
    filled: list[int]  # bytes of each chunk so far


class Shard(NamedTuple):
    """A file of tensors that is not complete yet."""

    path: Path  # the name of the complete file
    descriptor: int
    direct: bool  # O_DIRECT
    size: int
    offsets: Mapping[str, int]  # of each tensor's first byte
    blocks: dict[int, _Block]
    free: list[np.ndarray]
    lock: threading.Lock
    room: threading.Semaphore
    writers: ThreadPoolExecutor
    writes: dict[int, Future[str]]  # the digest of each block
    closed: threading.Event

    def sink(self, name: str, advance: Callable[[int], None]) -> Callable[[int, np.ndarray], None]:
        """Return a function that writes a chunk of ``name`` at a flat position and calls ``advance`` with its bytes."""
        offset = self.offsets[name]

        def write(position: int, chunk: np.ndarray) -> None:
            self.put(offset + position * chunk.itemsize, chunk.view(np.uint8))
            advance(chunk.nbytes)

        return write

    def put(self, at: int, data: np.ndarray) -> None:
        """Take bytes, uint8, for the file at the offset ``at``."""
        while data.size:
            number, inside = divmod(at, BLOCK)
            part = data[: BLOCK - inside]
            with self.lock:
                if number not in self.blocks:
                    buffer = self.free.pop() if self.free else np.frombuffer(mmap.mmap(-1, BLOCK), np.uint8)
                    self.blocks[number] = _Block(buffer, [])
                block = self.blocks[number]
            block.data[inside : inside + part.size] = part
            with self.lock:
                block.filled.append(part.size)
                whole = sum(block.filled) == min(BLOCK, self.size - number * BLOCK)
                if whole:
                    del self.blocks[number]
            if whole:
                self.room.acquire()
                self.writes[number] = self.writers.submit(self._write, number, block.data)
            at, data = at + part.size, data[part.size :]

    def close(self, parts: Iterable[Future[Any]]) -> None:
        """Wait for the tensors, sync, and rename; raises the first error of the tensors."""
        try:
            for part in parts:
                part.result()
            digests = [self.writes[number].result() for number in sorted(self.writes)]
            os.ftruncate(self.descriptor, self.size)
        finally:
            self.abandon()
        atomic.replace_file(atomic.hidden(self.path), self.path)
        mark(self.path).write_text(json.dumps({"size": self.size, "sha256": digests}))

    def abandon(self) -> None:
        """Close the file; a second call does nothing."""
        self.writers.shutdown()
        with self.lock:
            if not self.closed.is_set():
                self.closed.set()
                os.close(self.descriptor)

    def _write(self, number: int, data: np.ndarray) -> str:
        try:
            length = min(BLOCK, self.size - number * BLOCK)
            digest = hashlib.sha256(data[:length].data).hexdigest()
            left, at = data[: -(-length // _PAGE) * _PAGE] if self.direct else data[:length], number * BLOCK
            while left.size:
                done = os.pwrite(self.descriptor, left.data, at)
                left, at = left[done:], at + done
            if not self.direct:
                os.fdatasync(self.descriptor)
            return digest
        finally:
            with self.lock:
                self.free.append(data)
            self.room.release()


def create(path: Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shard:
    """Return a new file for arrays ``{name: (type, shape)}``, with its disk space allocated.

    Raises:
      OSError: the disk is too small.
    """
    begin, offsets, size = tensors.header(arrays)
    flags = os.O_CREAT | os.O_TRUNC | os.O_RDWR
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(atomic.hidden(path), flags | direct, 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:  # the error of a file system without O_DIRECT
            raise
        descriptor, direct = os.open(atomic.hidden(path), flags, 0o666), 0
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, -(-size // _PAGE) * _PAGE)
    except BaseException:
        os.close(descriptor)
        raise
    lock, room, writers = threading.Lock(), threading.Semaphore(WAITING), ThreadPoolExecutor(2)
    shard = Shard(path, descriptor, bool(direct), size, offsets, {}, [], lock, room, writers, {}, threading.Event())
    shard.put(0, np.frombuffer(begin, np.uint8))
    return shard


def finished(path: Path) -> bool:
    """Return whether an earlier merge completed this shard, and its bytes have the recorded digests."""
    try:
        recorded = json.loads(mark(path).read_text())
        with path.open("rb") as file:
            digests = [hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK), b"")]
        return recorded == {"size": path.stat().st_size, "sha256": digests}
    except (OSError, ValueError):
        return False


def mark(path: Path) -> Path:
    """Return the path of the file that marks a shard as complete; the file is not part of the output."""
    return path.with_name(path.name + ".done")
