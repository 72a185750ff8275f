"""Exact selection of the highest entries of an array: ties go to the lowest index, and N:M groups along the inputs."""

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.masks import INT32
from dsee_jax.typing import Array


@jax.jit
def top_k(score: Array, k: int | Array) -> jax.Array:
    """Return a bool mask like ``score``, True at exactly the ``k`` highest entries; ties go to the lowest flat index.

    ``k`` is clipped to 0 .. ``score.size`` and may be traced, so one compilation serves every ``k``. The cost is about fifty
    counting passes and no sort. Any sharding is allowed.

    Raises:
      InputError: the array has 2^31 entries or more, which an int32 cannot count: select part by part, as
        `dsee_jax.prune.weights` does.
    """
    return highest(ordered(score), k)


@jax.jit
def highest(rank: jax.Array, k: int | Array) -> jax.Array:
    """Return the mask of `top_k` for the numbers from `ordered`; raises as `top_k`."""
    if rank.size >= INT32:
        raise InputError(f"an array of {rank.size} entries has too many for one selection: select layer by layer")
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, rank.size)
    bound = _kth(rank, k)
    above, tied = rank > bound, rank == bound
    return (above | (tied & _first(tied, k - jnp.sum(above, dtype=jnp.int32)))) & (k > 0)


def ordered(score: Array) -> jax.Array:
    """Return uint32 numbers, shaped like ``score``, in the order of the scores (as float32); NaN becomes 0."""
    score = jnp.asarray(score, jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.int32)
    # The bits of floats are ordered like the floats; for negative floats the order is reversed.
    rank = jax.lax.bitcast_convert_type(bits, jnp.uint32) ^ jnp.where(
        bits < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000)
    )
    return jnp.where(jnp.isnan(score), jnp.uint32(0), rank)


def _kth(rank: jax.Array, k: jax.Array) -> jax.Array:
    """Return the ``k``-th highest (from 1) number, bit by bit."""

    def try_bit(number: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        return jnp.where(jnp.sum(rank >= higher, dtype=jnp.int32) >= k, higher, bound)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.uint32(0))


def _first(tied: jax.Array, count: jax.Array) -> jax.Array:
    """Return the mask of the flat indices up to the ``count``-th True of ``tied``; bisection beats a cumulative sum."""
    flat = jnp.arange(tied.size, dtype=jnp.int32).reshape(tied.shape)

    def halve(_: int, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = span
        middle = low + (high - low) // 2
        enough = jnp.sum(tied & (flat < middle), dtype=jnp.int32) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # `low` covers too few entries, `high` enough.
    zero = jnp.zeros_like(count)
    return flat < jax.lax.fori_loop(0, tied.size.bit_length(), halve, (zero - 1, zero + tied.size))[1]


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
    rank = ordered(score).reshape(*leading, rows // m, m, columns)
    own, other = rank[..., :, None, :], rank[..., None, :, :]
    earlier = jnp.broadcast_to(jnp.tri(m, k=-1, dtype=bool)[:, :, None], (*rank.shape[:-1], m, columns))
    beaten_by = jnp.sum((other > own) | ((other == own) & earlier), axis=-2)
    return (beaten_by < n).reshape(score.shape)
