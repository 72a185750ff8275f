"""Tensors that are read in chunks, in bounded memory: as stored, with an adapter folded in, or with reordered rows."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsee_jax.ckpt import tensors
from dsee_jax.ckpt.tensors import DTYPES, Stored

_BLOCK = 1 << 20


class Lazy(NamedTuple):
    """A tensor that is read in chunks.

    ``read(start, stop)`` returns the flat elements [start, stop) in row-major order, in ``dtype``, perhaps read-only. It needs
    memory for the chunk and one row, and raises `InputError` if the file has become shorter.
    """

    shape: tuple[int, ...]
    dtype: str  # of `read`'s result, by its name in safetensors
    files: tuple[Path, ...]  # the files that `read` reads, the tensor's own first
    nbytes: int  # of the whole tensor on disk
    read: Callable[[int, int], np.ndarray]
    stored: str | None = None  # the type in the model's file, where ``read`` computes in another; None: ``dtype``


def plain(stored: Stored) -> Lazy:
    """Return a tensor as stored in its file, memory-mapped."""
    return Lazy(
        stored.shape,
        stored.dtype,
        (stored.file,),
        stored.nbytes,
        lambda start, stop: tensors.mapped(stored, start, stop),
    )


def cast(tensor: Lazy, dtype: str) -> Lazy:
    """Return a tensor that is read in another type, by its name in safetensors."""
    if dtype == tensor.dtype:
        return tensor
    return tensor._replace(dtype=dtype, read=lambda start, stop: tensor.read(start, stop).astype(DTYPES[dtype]))


def from_array(array: np.ndarray, file: Path) -> Lazy:
    """Return a small tensor that is in memory, in float32; ``file`` is its source."""
    flat = np.ascontiguousarray(array, np.float32).ravel()
    return Lazy(array.shape, "F32", (file,), flat.nbytes, lambda start, stop: flat[start:stop])


def adapted(
    base: Lazy,
    file: Path,
    *,
    factors: tuple[np.ndarray, np.ndarray] | None = None,
    sparse: tuple[np.ndarray, np.ndarray] | None = None,
    kept: np.ndarray | None = None,
) -> Lazy:
    """Return ``kept * base + left @ right + sparse`` in float32.

    Args:
      base: a matrix (rows, columns).
      file: of the adapter.
      factors: ``left`` (rows, rank), scaled, and ``right`` (rank, columns), float32.
      sparse: flat positions (nonzeros,) int64, ascending, and float32 values (nonzeros,), scaled.
      kept: the mask as bits in row-major order, uint8 (ceil(rows * columns / 8),); 1 = kept.
    """
    columns = base.shape[1]

    def read(start: int, stop: int) -> np.ndarray:
        chunk = base.read(start, stop).astype(np.float32)
        if kept is not None:
            bits = np.unpackbits(kept[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
            chunk[bits == 0] = 0
        if factors is not None:
            first, last = start // columns, -(-stop // columns)
            update = (factors[0][first:last] @ factors[1]).ravel()
            chunk += update[start - first * columns : stop - first * columns]
        if sparse is not None:
            positions, values = sparse
            low, high = np.searchsorted(positions, [start, stop])
            np.add.at(chunk, positions[low:high] - start, values[low:high])
        return chunk

    return Lazy(base.shape, "F32", (*base.files, file), base.nbytes, read, base.stored or base.dtype)


def with_rows(base: Lazy, file: Path, rows: np.ndarray, values: np.ndarray) -> Lazy:
    """Return a matrix (rows, columns) in which some rows have other values, in float32.

    Args:
      base: the matrix.
      file: the source of the values.
      rows: int64 (n,), the rows.
      values: float32 (n, columns), of each of them.
    """
    columns = base.shape[1]
    order = np.argsort(rows, kind="stable")
    rows, values = rows[order], values[order]

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // columns, -(-stop // columns)
        block = np.asarray(base.read(first * columns, last * columns), np.float32).reshape(-1, columns).copy()
        low, high = np.searchsorted(rows, [first, last])
        block[rows[low:high] - first] = values[low:high]
        return block.ravel()[start - first * columns : stop - first * columns]

    return Lazy(base.shape, "F32", (*base.files, file), base.nbytes, read, base.stored or base.dtype)


def equal(a: Lazy, b: Lazy) -> bool:
    """Return whether two tensors have the same shape and values."""
    if a is b:
        return True
    size = prod(a.shape)
    ends = ((start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))
    return a.shape == b.shape and all(np.array_equal(a.read(*part), b.read(*part)) for part in ends)


def aligned(source: Lazy, rows: np.ndarray, fills: Mapping[int, Sequence[tuple[Lazy, int]]], token_rows: int) -> Lazy:
    """Return a tensor with reordered and new rows: an embedding or an output matrix of another vocabulary.

    The type is the source's if rows are only moved, and F32 if rows are means or come from tensors of another type.

    Args:
      source: (old rows, ...).
      rows: int64 (new rows,), the row of ``source`` at each new row; -1: no row of ``source``.
      fills: for a new row without a row of ``source``, the rows ``(tensor, row)`` whose mean it gets; without an entry, the
        new row is zero.
      token_rows: the rows from this number on are padding: each is the mean of all rows before this number.
    """
    width = prod(source.shape[1:])
    parts = [part for row in fills.values() for part in row]
    means = token_rows < len(rows) or any(len(row) > 1 for row in fills.values())
    mixed = any(lazy.dtype != source.dtype for lazy, _ in parts)
    dtype = "F32" if means or mixed else source.dtype

    def gather(first: int, last: int) -> np.ndarray:
        """Return rows [first, last), all below ``token_rows``, as (rows, width)."""
        gathered, here = np.zeros((last - first, width), DTYPES[dtype]), rows[first:last]
        # Most neighbouring rows stay neighbours: each run of rows is read at once.
        breaks = np.flatnonzero((np.diff(here) != 1) | (here[:-1] < 0)) + 1
        for begin, end in itertools.pairwise([0, *breaks.tolist(), last - first]):
            old = int(here[begin]) if end > begin else -1
            if old >= 0:
                gathered[begin:end] = source.read(old * width, (old + end - begin) * width).reshape(-1, width)
        for row in np.flatnonzero(here < 0).tolist():
            taken = [lazy.read(old * width, (old + 1) * width) for lazy, old in fills.get(first + row, ())]
            if taken:
                gathered[row] = taken[0] if len(taken) == 1 else np.mean(np.asarray(taken, np.float64), axis=0)
        return gathered

    @functools.cache
    def mean() -> np.ndarray:
        total, step = np.zeros(width), max(_BLOCK // width, 1)
        for first in range(0, token_rows, step):
            total += gather(first, min(first + step, token_rows)).sum(axis=0, dtype=np.float64)
        return total / token_rows

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // width, -(-stop // width)
        chunk = gather(min(first, token_rows), min(last, token_rows))
        if last > token_rows:
            padding = np.broadcast_to(mean().astype(chunk.dtype), (last - max(first, token_rows), width))
            chunk = np.concatenate([chunk, padding])
        return chunk.ravel()[start - first * width : stop - first * width]

    files = tuple(dict.fromkeys((*source.files, *(file for lazy, _ in parts for file in lazy.files))))
    return Lazy((len(rows), *source.shape[1:]), dtype, files, source.nbytes, read, source.stored or source.dtype)
