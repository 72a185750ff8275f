"""Where a sparse update may live, on one array: exact top-k, and the selectors of coordinates.

A selector takes a kernel ``w`` (in, out) and returns a *support*: int32 (nonzeros, 2), the row (input) and column (output)
of exactly that many different entries, in row-major order. All of them work under ``jax.jit`` and ``jax.vmap``.
Not-a-number counts as the lowest score there is, and -0.0 as 0.0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsee_jax import decompose
from dsee_jax.aliases import Array, Key
from dsee_jax.errors import InputError


@jax.jit
def top_k(score: Array, k: int | Array) -> jax.Array:
    """Return a bool mask, shaped like ``score``, that is True at exactly the ``k`` highest; ties go to the lowest flat index.

    ``k`` may be traced (so one compilation serves every ``k``); it is taken into 0 .. ``score.size``. Cost: about fifty
    counting passes and no sort, so any size under 2^31 and any sharding will do.
    """
    return highest(ordered(score), k)


@jax.jit
def highest(rank: jax.Array, k: int | Array) -> jax.Array:
    """Do what `top_k` does for the numbers that `ordered` gives."""
    k = jnp.clip(jnp.asarray(k, jnp.int32), 0, rank.size)
    bound = _kth(rank, k)
    above, tied = rank > bound, rank == bound
    return (above | (tied & _first(tied, k - jnp.sum(above, dtype=jnp.int32)))) & (k > 0)


def ordered(score: Array) -> jax.Array:
    """Return uint32 numbers, shaped like ``score``, that compare as the scores do (float32); not-a-number becomes 0."""
    score = jnp.asarray(score, jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.int32)
    # Floats compare as their bits do; those of negative ones run backwards.
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
    """Mask the flat indices up to the ``count``-th True of ``tied``, by bisection (a cumulative sum is slower)."""
    flat = jnp.arange(tied.size, dtype=jnp.int32).reshape(tied.shape)

    def halve(_: int, span: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = span
        middle = low + (high - low) // 2
        enough = jnp.sum(tied & (flat < middle), dtype=jnp.int32) >= count
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # `low` has too few (or is 0), `high` enough.
    zero = jnp.zeros_like(count)
    return flat < jax.lax.fori_loop(0, tied.size.bit_length(), halve, (zero - 1, zero + tied.size))[1]


def n_m(score: Array, n: int, m: int) -> jax.Array:
    """Return a bool mask that keeps the ``n`` highest of every ``m`` consecutive inputs; ties go to the lowest index.

    Args:
      score: (in, out), or with leading axes (..., in, out).
      n: how many to keep, 0 .. m.
      m: the length of a group; must divide ``in``.

    Raises:
      InputError: n or m is out of range, or m does not divide ``in``.
    """
    *leading, rows, columns = score.shape
    if not 0 <= n <= m or m < 1:
        raise InputError(f"{n}:{m} keeps {n} of every {m}: use 0 <= n <= m, for instance 2:4")
    if rows % m:
        raise InputError(f"{n}:{m} needs inputs in groups of {m}; found {rows}, which {m} does not divide")
    rank = ordered(score).reshape(*leading, rows // m, m, columns)
    mine, other = rank[..., :, None, :], rank[..., None, :, :]
    earlier = jnp.broadcast_to(jnp.tri(m, k=-1, dtype=bool)[:, :, None], (*rank.shape[:-1], m, columns))
    beaten_by = jnp.sum((other > mine) | ((other == mine) & earlier), axis=-2)
    return (beaten_by < n).reshape(score.shape)


def coordinates(index: Array, columns: int) -> jax.Array:
    """Return the support (nonzeros, 2), in row-major order, of flat indices (nonzeros,) into a kernel with ``columns``."""
    index = jnp.sort(jnp.asarray(index, jnp.int32))
    return jnp.stack([index // columns, index % columns], axis=-1)


def magnitude(w: Array, nonzeros: int, *, key: Key | None = None) -> jax.Array:
    """Support of the largest ``|w|``; ties go to the lowest flat index. ``key`` is not used."""
    del key
    _check(w, nonzeros)
    return coordinates(jax.lax.top_k(ordered(jnp.abs(w)).ravel(), nonzeros)[1], w.shape[1])


def random(w: Array, nonzeros: int, *, key: Key) -> jax.Array:
    """Support drawn without replacement, every set equally likely."""
    _check(w, nonzeros)
    # The highest of as many random numbers: a permutation would sort them all.
    return coordinates(jax.lax.top_k(jax.random.bits(key, (w.size,)), nonzeros)[1], w.shape[1])


def grebsmo(w: Array, nonzeros: int, *, key: Key, rank: int = 0) -> jax.Array:
    """Support of what stands out most from a low-rank matrix (`decompose.grebsmo`; the default of DSEE).

    ``rank`` is that of the low-rank part, up to half of the smaller side; 0 stands for a quarter of it, at most 96.
    """
    _check(w, nonzeros)
    return coordinates(decompose.spikes(w, rank or min(min(w.shape) // 4, 96), nonzeros, key=key), w.shape[1])


def _check(w: Array, nonzeros: int) -> None:
    if w.ndim != 2:
        raise InputError(f"a kernel (in, out) is expected, found the shape {w.shape}: use jax.vmap over leading axes")
    if not 0 <= nonzeros <= w.size:
        raise InputError(f"nonzeros is {nonzeros} for a kernel of {w.size} entries: use 0 to {w.size}")


SUPPORTS: dict[str, Callable[..., jax.Array]] = {"grebsmo": grebsmo, "magnitude": magnitude, "random": random}
"""Every selector by name: ``select(w, nonzeros, *, key)``."""
