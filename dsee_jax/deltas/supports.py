"""Selectors of the coordinates of a sparse update, for one kernel.

A selector takes a kernel ``w`` (in, out) and returns a *support*, int32 (nonzeros, 2): the row (input) and column (output) of
exactly ``nonzeros`` different entries, in row-major order. All selectors work under ``jax.jit`` and ``jax.vmap``.
Not-a-number counts as the lowest score, and -0.0 as 0.0.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsee_jax.counts import INT32
from dsee_jax.deltas import decompose
from dsee_jax.errors import InputError
from dsee_jax.ops.topk import ordered
from dsee_jax.typing import Array, Key


@functools.partial(jax.jit, static_argnums=1)
def coordinates(index: Array, columns: int) -> jax.Array:
    """Return the support (nonzeros, 2), in row-major order, of flat indices (nonzeros,) into a kernel with ``columns``."""
    index = jnp.sort(jnp.asarray(index, jnp.int32))
    return jnp.stack([index // columns, index % columns], axis=-1)


def magnitude(w: Array, nonzeros: int, *, key: Key | None = None) -> jax.Array:
    """Return the support of the largest ``|w|``; ties go to the lowest flat index. ``key`` is not used."""
    del key
    _check(w, nonzeros)
    return coordinates(jax.lax.top_k(ordered(jnp.abs(w)).ravel(), nonzeros)[1], w.shape[1])


def random(w: Array, nonzeros: int, *, key: Key) -> jax.Array:
    """Return a support drawn without replacement; all sets of entries are equally likely."""
    _check(w, nonzeros)
    # The top-k of random numbers, as a permutation would sort all of them.
    return coordinates(jax.lax.top_k(jax.random.bits(key, (w.size,)), nonzeros)[1], w.shape[1])


def grebsmo(w: Array, nonzeros: int, *, key: Key, rank: int = 0) -> jax.Array:
    """Return the support of the entries that stand out most from a low-rank matrix (`decompose.grebsmo`, as in DSEE).

    ``rank`` is the rank of that matrix, up to half of the smaller side of ``w``. 0: a quarter of the smaller side, at most 96.
    """
    _check(w, nonzeros)
    return coordinates(decompose.spikes(w, rank or min(min(w.shape) // 4, 96), nonzeros, key=key), w.shape[1])


def _check(w: Array, nonzeros: int) -> None:
    if w.ndim != 2:
        raise InputError(f"expected a kernel (in, out), found the shape {w.shape}: use jax.vmap over leading axes")
    if w.size >= INT32:
        raise InputError(f"a kernel of {w.size} entries has too many for a support: leave it out of delta.targets")
    if not 0 <= nonzeros <= w.size:
        raise InputError(f"nonzeros is {nonzeros} for a kernel of {w.size} entries: use 0 to {w.size}")


SUPPORTS: dict[str, Callable[..., jax.Array]] = {"grebsmo": grebsmo, "magnitude": magnitude, "random": random}
"""Every selector by name: ``select(w, nonzeros, *, key)``."""
