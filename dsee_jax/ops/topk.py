"""Exact selection of the highest entries of arrays: ties go to the lowest index, and N:M groups along the inputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax import counts
from dsee_jax.auto_axes import auto_sharded, spec
from dsee_jax.counts import Count
from dsee_jax.errors import InputError
from dsee_jax.typing import Array


def top_k(score: Array, k: int | Array) -> jax.Array:
    """Return a bool mask like ``score``, True at exactly the ``k`` highest entries; ties go to the lowest flat index.

    ``k`` is clipped to 0 .. ``score.size`` and may be traced, so one compilation serves every ``k``. The cost is about forty
    counting passes and no sort. Any sharding is allowed.

    Raises:
      InputError: as `dsee_jax.counts.check`.
    """
    if isinstance(k, int | np.integer):
        k = min(max(int(k), 0), score.size)
    else:
        k = jnp.clip(jnp.asarray(k, jnp.int32), 0, min(score.size, counts.INT32 - 1))
    return highest([ordered(score)], counts.of(k))[0]


def highest(ranks: Sequence[jax.Array], k: Count) -> list[jax.Array]:
    """Return the masks of the ``k`` highest numbers of all arrays together; ties go to the first array, then row-major.

    Args:
      ranks: uint32 arrays from `ordered`, of any shapes.
      k: at most the number of all entries.

    Raises:
      InputError: as `dsee_jax.counts.check`.
    """
    counts.check(*(rank.shape for rank in ranks))
    bound, taken = _bound(list(ranks), k)
    masks: list[jax.Array] = []
    for rank in ranks:
        mask, taken = _take(rank, bound, taken, k)
        masks.append(mask)
    return masks


@jax.jit
def ordered(score: Array) -> jax.Array:
    """Return uint32 numbers, shaped like ``score``, in the order of the scores (as float32); NaN becomes 0."""
    score = jnp.asarray(score, jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.int32)
    # The bits of floats are ordered like the floats; for negative floats the order is reversed.
    rank = jax.lax.bitcast_convert_type(bits, jnp.uint32) ^ jnp.where(
        bits < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000)
    )
    return jnp.where(jnp.isnan(score), jnp.uint32(0), rank)


def _bound(ranks: list[jax.Array], k: Count) -> tuple[jax.Array, Count]:
    """Return the ``k``-th highest number (from 1) of all arrays, bit by bit, and the count of the numbers above it.

    The last number that does not reach k is the bound + 1. Where k is 0, the bound is the highest uint32, which no score has.
    """

    def try_bit(number: Any, state: tuple[jax.Array, Count]) -> tuple[jax.Array, Count]:
        return _decide([_reaching(rank, state[0], number) for rank in ranks], k, number, state)

    start = (jnp.uint32(0), Count(jnp.uint32(0), jnp.uint32(0)))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((ranks, k))):
        return jax.lax.fori_loop(0, 32, try_bit, start)
    # A compiled loop would copy all ranks; one small program for each shape is also the quickest to compile and to run.
    return functools.reduce(lambda state, number: try_bit(np.uint32(number), state), range(32), start)


@jax.jit
def _reaching(rank: jax.Array, bound: jax.Array, number: jax.Array) -> jax.Array:
    """Return the counts of the numbers that reach the bound with the bit ``number`` set."""
    return counts.parts(rank >= _with_bit(bound, number))


@jax.jit
def _decide(
    parts: list[jax.Array], k: Count, number: jax.Array, state: tuple[jax.Array, Count]
) -> tuple[jax.Array, Count]:
    """Return the bound with the bit ``number`` set if the counts ``parts`` reach ``k``."""
    (bound, above), count = state, counts.total(*parts)
    reaches = counts.at_least(count, k)
    return jnp.where(reaches, _with_bit(bound, number), bound), counts.where(reaches, above, count)


def _with_bit(bound: jax.Array, number: jax.Array) -> jax.Array:
    return bound | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))


@jax.jit
def _take(rank: jax.Array, bound: jax.Array, taken: Count, k: Count) -> tuple[jax.Array, Count]:
    """Return the mask of one array, and ``taken`` plus the ties of this array.

    ``taken`` counts all numbers above the bound and the ties of the arrays before this one. The first of the ties fill it up
    to ``k``: all ties of the rows before one row, and of this row those before one column.
    """
    rows, columns = rank.shape[:-1] or (1,), rank.shape[-1] if rank.ndim else 1
    wide = rank.reshape(*rows, columns) if rank.ndim < 2 else rank
    tied = wide == bound
    ties = jnp.sum(tied, axis=-1, dtype=jnp.int32)
    number, place = jnp.arange(ties.size, dtype=jnp.int32).reshape(rows), jnp.arange(columns, dtype=jnp.int32)
    row, filled = _fill(taken, k, ties.size, lambda row: counts.total(jnp.where(number < row, ties, 0)))
    own = jnp.any(tied & (number == row)[..., None], axis=tuple(range(len(rows))))
    column, _ = _fill(filled, k, columns, lambda column: counts.of(jnp.sum(own & (place < column), dtype=jnp.int32)))
    place = place.reshape(*(1 for _ in rows), columns)
    chosen = (number < row)[..., None] | ((number == row)[..., None] & (place < column))
    mask = (wide > bound) | (tied & chosen)
    return mask.reshape(rank.shape), counts.add(taken, counts.total(ties))


def _fill(taken: Count, k: Count, limit: int, before: Callable[[jax.Array], Count]) -> tuple[jax.Array, Count]:
    """Return the largest number up to ``limit`` for which ``taken + before(number)`` is at most ``k``, and this sum.

    ``before`` must not fall. Where no number fits, the result is 0 and ``taken``.
    """
    bits = limit.bit_length()

    def try_bit(step: jax.Array, fit: tuple[jax.Array, Count]) -> tuple[jax.Array, Count]:
        higher = fit[0] | (jnp.int32(1) << (bits - 1 - step).astype(jnp.int32))
        count = counts.add(taken, before(higher))
        fits = (higher <= limit) & counts.at_least(k, count)
        return jnp.where(fits, higher, fit[0]), counts.where(fits, count, fit[1])

    return jax.lax.fori_loop(0, bits, try_bit, (jnp.int32(0), taken))


@functools.partial(jax.jit, static_argnums=(1, 2))
def n_m(score: Array, n: int, m: int) -> jax.Array:
    """Return a bool mask that keeps the ``n`` highest of every ``m`` consecutive inputs; ties go to the lowest index.

    Args:
      score: (..., in, out).
      n: the number of kept inputs per group, 0 .. m.
      m: the length of a group, which must divide ``in``.

    Raises:
      InputError: n or m is out of range, or m does not divide ``in``.
    """
    *leading, rows, columns = score.shape
    if not 0 <= n <= m or m < 1:
        raise InputError(f"{n}:{m} keeps {n} of every {m}: use 0 <= n <= m, for instance 2:4")
    if rows % m:
        raise InputError(f"{n}:{m} needs inputs in groups of {m}; found {rows}, which {m} does not divide")

    def mask(rank: jax.Array) -> jax.Array:
        rank = rank.reshape(*leading, rows // m, m, columns)
        own, other = rank[..., :, None, :], rank[..., None, :, :]
        earlier = jnp.broadcast_to(jnp.tri(m, k=-1, dtype=bool)[:, :, None], (*rank.shape[:-1], m, columns))
        beaten_by = jnp.sum((other > own) | ((other == own) & earlier), axis=-2)
        return (beaten_by < n).reshape(score.shape)

    return auto_sharded(mask, ordered(score), out=spec(score))
