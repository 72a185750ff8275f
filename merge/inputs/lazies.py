"""Tensors that are read a stretch at a time, in bounded memory: as stored, with an adapter folded in, with rows moved."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsee_jax.ckpt import tensors
from dsee_jax.ckpt.tensors import DTYPES, Stored

FLOATS = ("F64", "F32", "F16", "BF16")
"""The types that are merged; tensors of any other are copied."""

_BLOCK = 1 << 20


class Lazy(NamedTuple):
    """A tensor that is read a stretch at a time.

    ``read(start, stop)`` returns the flat elements [start, stop) in row-major order, in ``dtype``, perhaps read-only. It takes
    the memory of what was asked for, plus a row; it raises `InputError` where a file has become shorter.
    """

    shape: tuple[int, ...]
    dtype: str  # what `read` returns, by its name in safetensors
    files: tuple[Path, ...]  # what `read` reads; the tensor's own file first
    nbytes: int  # of the whole tensor on the disk
    read: Callable[[int, int], np.ndarray]


def plain(stored: Stored) -> Lazy:
    """Return a tensor as its file holds it, memory-mapped."""
    return Lazy(
        stored.shape,
        stored.dtype,
        (stored.file,),
        stored.nbytes,
        lambda start, stop: tensors.mapped(stored, start, stop),
    )


def held(array: np.ndarray, file: Path) -> Lazy:
    """Return a small tensor in memory that came from ``file``, in float32."""
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
        found = base.read(start, stop).astype(np.float32)
        if kept is not None:
            bits = np.unpackbits(kept[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
            found[bits == 0] = 0
        if factors is not None:
            first, last = start // columns, -(-stop // columns)
            update = (factors[0][first:last] @ factors[1]).ravel()
            found += update[start - first * columns : stop - first * columns]
        if sparse is not None:
            positions, values = sparse
            low, high = np.searchsorted(positions, [start, stop])
            np.add.at(found, positions[low:high] - start, values[low:high])
        return found

    return Lazy(base.shape, "F32", (*base.files, file), base.nbytes, read)


def aligned(source: Lazy, rows: np.ndarray, fills: Mapping[int, Sequence[tuple[Lazy, int]]], known: int) -> Lazy:
    """Return a tensor's rows in another order, with new ones: an embedding or an output matrix of another vocabulary.

    Its type is the source's where rows are only moved; F32 where some are means, or come from models of another type.

    Args:
      source: (old rows, ...).
      rows: int64 (new rows,), which row of ``source`` each one is; -1: none.
      fills: for a new row that is none, rows of other tensors of which it is the mean; one that is not here is zero.
      known: the rows from here on are padding, the mean of all rows before.
    """
    width = prod(source.shape[1:])
    parts = [part for row in fills.values() for part in row]
    means = known < len(rows) or any(len(row) > 1 for row in fills.values())
    mixed = any(lazy.dtype != source.dtype for lazy, _ in parts)
    dtype = "F32" if means or mixed else source.dtype

    def gather(first: int, last: int) -> np.ndarray:
        """Return rows [first, last), all below ``known``, as (rows, width)."""
        found, here = np.zeros((last - first, width), DTYPES[dtype]), rows[first:last]
        # Neighbours stay neighbours in most vocabularies: one read for each run of them.
        breaks = np.flatnonzero((np.diff(here) != 1) | (here[:-1] < 0)) + 1
        for begin, end in itertools.pairwise([0, *breaks.tolist(), last - first]):
            old = int(here[begin]) if end > begin else -1
            if old >= 0:
                found[begin:end] = source.read(old * width, (old + end - begin) * width).reshape(-1, width)
        for row in np.flatnonzero(here < 0).tolist():
            taken = [lazy.read(old * width, (old + 1) * width) for lazy, old in fills.get(first + row, ())]
            if taken:
                found[row] = taken[0] if len(taken) == 1 else np.mean(np.asarray(taken, np.float64), axis=0)
        return found

    @functools.cache
    def mean() -> np.ndarray:
        total, step = np.zeros(width), max(_BLOCK // width, 1)
        for first in range(0, known, step):
            total += gather(first, min(first + step, known)).sum(axis=0, dtype=np.float64)
        return total / known

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // width, -(-stop // width)
        found = gather(min(first, known), min(last, known))
        if last > known:
            padding = np.broadcast_to(mean().astype(found.dtype), (last - max(first, known), width))
            found = np.concatenate([found, padding])
        return found.ravel()[start - first * width : stop - first * width]

    files = tuple(dict.fromkeys((*source.files, *(file for lazy, _ in parts for file in lazy.files))))
    return Lazy((len(rows), *source.shape[1:]), dtype, files, source.nbytes, read)
