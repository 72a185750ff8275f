"""One matrix taken apart: low rank plus a few spikes (GreBsmo), and truncated singular value decompositions.

`grebsmo` is the split of DSEE (arXiv 2111.00160, section 3.2, after Zhou and Tao's greedy bilateral smoothing): U, V and S
take turns. What is different from the authors' code, and why:

- The rank stays at or under half of the smaller side, so there is always something left for S to explain. It is taken whole
  from the start: entries that enter S while the rank is still too low are slow to leave it again.
- S is the ``nonzeros`` entries that stand out most, by an exact top-k and not by a threshold that few entries may pass.
- A low-rank part with spare rank would bend towards the spikes and hide them. So the columns are dealt into two halves at
  random, anew in every round, and the basis fitted to one half explains the other: a spike never takes part in its own
  prediction. What is left is divided by its standard deviation under noise (a studentised residual), since a row that the
  basis holds on to leaves little.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Key

ROUNDS = 10
"""Turns of U, V and S."""
_LEAST_FREE = 0.5
"""Divisor, at least, of a residual that becomes a value of S: a smaller one could make noise into a spike."""

_LEAST_SHARE = 1e-4
"""What rounding leaves of the variance of a row that a basis explains wholly."""
_BLOCK = 48
"""Triangular matrices up to this size are inverted by solving."""

_barrier = jax.lax.optimization_barrier


def svd(w: Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``u (in, rank)``, ``s (rank,)`` descending and ``v (rank, out)`` with ``(u * s) @ v`` the nearest of that rank.

    Raises:
      InputError: rank is not within 0 .. min(in, out).
    """
    _check_rank(w, rank, min(w.shape))
    u, s, v = jnp.linalg.svd(_float32(w), full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def randomized_svd(
    w: Array, rank: int, *, key: Key, oversample: int = 8, iterations: int = 2
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return nearly what `svd` does, at a small part of its cost (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).

    Args:
      w: (in, out).
      rank: how many singular values.
      key: draws the test matrix.
      oversample: columns of the test matrix beyond ``rank``; cut to what the matrix has.
      iterations: power iterations; more of them help where the singular values fall slowly.

    Raises:
      InputError: rank is not within 0 .. min(in, out).
    """
    _check_rank(w, rank, min(w.shape))
    with jax.default_matmul_precision("highest"):
        w = _float32(w)
        basis = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], min(rank + oversample, *w.shape))))[0]
        for _ in range(iterations):
            basis = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ basis)[0])[0]
        u, s, v = jnp.linalg.svd(basis.T @ w, full_matrices=False)
        return (basis @ u)[:, :rank], s[:rank], v[:rank]


@functools.partial(jax.jit, static_argnames=("rank", "nonzeros"))
def grebsmo(w: Array, rank: int, nonzeros: int = 64, *, key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split a matrix into ``u @ v + s`` and a small rest.

    Args:
      w: (in, out), any floating dtype; computed in float32.
      rank: of ``u @ v``, from 0 to half of the smaller side.
      nonzeros: entries of ``s``.
      key: draws the start and the halves.

    Returns:
      ``u`` (in, rank) with orthonormal columns, ``v`` (rank, out), and ``s`` (in, out), 0 but at `spikes` where it is
      ``w - u @ v``.

    Raises:
      InputError: rank or nonzeros is out of range.
    """
    index = spikes(w, rank, nonzeros, key=key)
    with jax.default_matmul_precision("highest"):
        w = _float32(w)
        support = jnp.zeros(w.size, bool).at[index].set(True).reshape(w.shape)
        u = jax.random.normal(jax.random.fold_in(key, 1), (w.shape[0], rank))

        def turn(_: int, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            u, s = parts[0], parts[2]
            u = jnp.linalg.qr((w - s) @ jnp.linalg.qr((w - s).T @ u)[0])[0]
            v = u.T @ (w - s)
            return u, v, jnp.where(support, w - u @ v, 0)

        u, v, s = jax.lax.fori_loop(0, ROUNDS, turn, (u, u.T @ w, jnp.zeros_like(w)))
        return u, v, s


@functools.partial(jax.jit, static_argnames=("rank", "nonzeros"))
def spikes(w: Array, rank: int, nonzeros: int, *, key: Key) -> jax.Array:
    """Return the ``nonzeros`` flat indices, all different, where ``w`` (in, out) stands out most from a matrix of low rank.

    They come in the order of how much they stand out. Arguments and errors as of `grebsmo`; for rank 0 they are the largest
    ``|w|``. Memory: a few times ``w``. Everything is a matrix product, a small Cholesky factor or a top-k, so many matrices
    go well under one ``jax.vmap``.
    """
    _check_rank(w, rank, min(w.shape) // 2)
    if not 0 <= nonzeros <= w.size:
        raise InputError(f"nonzeros is {nonzeros} for a matrix of {w.size} entries: use 0 to {w.size}")
    if w.shape[0] > w.shape[1]:  # The basis is cheaper on the shorter side.
        index = spikes(w.T, rank, nonzeros, key=key)
        return index % w.shape[0] * w.shape[1] + index // w.shape[0]
    w = _float32(w)
    if not rank:
        return _largest(w, nonzeros)
    start, *keys = jax.random.split(key, ROUNDS + 1)
    bases = jax.random.normal(start, (2, w.shape[0], rank))
    with jax.default_matmul_precision("highest"):
        _, found = jax.lax.scan(
            lambda carry, key: _round(w, carry[0], carry[1], nonzeros, key), (bases, jnp.zeros_like(w)), jnp.stack(keys)
        )
    return found[-1]


def _round(w: jax.Array, bases: jax.Array, s: jax.Array, nonzeros: int, key: Key):
    """One turn of U, V and S; ``bases`` (2, in, rank), one for each half of the columns.

    The barriers keep XLA's CPU compiler from computing a gather or a sum again in each of its consumers: four times faster.
    """
    columns = w.shape[1]
    half = columns // 2
    order = jax.random.permutation(key, columns)
    back = jnp.argsort(order)
    clean = _barrier(jnp.take(w - s, order, axis=1))
    left, right = clean[:, :half], clean[:, half:]
    bases = _barrier(_fit(jnp.stack([left, right[:, -half:]]), bases))
    rest = jnp.concatenate([_without(left, bases[1]), _without(right, bases[0])], axis=1)
    # Of the variance of a noise entry in row i, a basis that other columns made leaves the share `free`.
    free = jnp.maximum(1 - jnp.sum(bases * bases, axis=2), _LEAST_SHARE)
    free = jnp.where((back < half)[None, :], free[1][:, None], free[0][:, None])
    free, rest = _barrier((free, jnp.take(rest, back, axis=1)))
    index = _largest(s * jnp.sqrt(free) + rest / jnp.sqrt(free), nonzeros)
    values = (s + rest / jnp.maximum(free, _LEAST_FREE)).ravel()[index]
    return (bases, jnp.zeros(w.size).at[index].set(values).reshape(w.shape)), index


def _fit(x: jax.Array, u: jax.Array) -> jax.Array:
    """One power iteration for the column spaces of a stack ``x`` (n, in, columns) from ``u`` (n, in, rank)."""
    return _orthonormal(x @ _orthonormal(_transposed(x) @ u, 1), 2)


def _without(x: jax.Array, u: jax.Array) -> jax.Array:
    return x - u @ (u.T @ x)


def _orthonormal(x: jax.Array, passes: int) -> jax.Array:
    """Orthonormal columns by repeated shifted Cholesky-QR (Fukaya et al. 2020): matrix products where QR would be a loop."""
    tiny, eps = jnp.finfo(x.dtype).tiny, jnp.finfo(x.dtype).eps
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True), tiny)
    eye = jnp.eye(x.shape[2])[None]
    for _ in range(passes):
        gram = _transposed(x) @ x
        shift = eps * jnp.trace(gram, axis1=1, axis2=2) + tiny
        x = x @ _transposed(_inverse(jnp.linalg.cholesky(gram + shift[:, None, None] * eye)))
    return x


def _inverse(lower: jax.Array) -> jax.Array:
    """Inverses of lower triangular matrices (n, size, size), mostly by products: solving is ten times slower on a CPU.

    All diagonal blocks are solved in one call, after which blocks merge in pairs. Not one call each: in jaxlib 0.10 batched
    LAPACK calls that nothing orders wait for each other's threads for ever. For the same reason both halves are stacked.
    """
    size = lower.shape[1]
    levels = max(0, math.ceil(math.log2(size / _BLOCK)))
    width = -(-size // 2**levels)
    spare = jnp.arange(size, width << levels)
    lower = jnp.pad(lower, ((0, 0), (0, len(spare)), (0, len(spare)))).at[:, spare, spare].set(1)

    def blocks(width: int, row: int, step: int) -> jax.Array:
        """Blocks of this width, each ``row`` below the diagonal, one every ``step`` along it."""
        starts = range(0, lower.shape[1] - row, step)
        return jnp.stack([lower[:, i + row : i + row + width, i : i + width] for i in starts], axis=1)

    diagonal = blocks(width, 0, width)
    eye = jnp.broadcast_to(jnp.eye(width), diagonal.shape)
    inverse = jax.lax.linalg.triangular_solve(diagonal, eye, left_side=True, lower=True)
    for _ in range(levels):
        first, last = inverse[:, 0::2], inverse[:, 1::2]
        corner = -last @ (blocks(width, width, 2 * width) @ first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=3)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, last], axis=3)], axis=2)
        width *= 2
    return inverse[:, 0, :size, :size]


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _largest(x: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(_barrier(jnp.nan_to_num(jnp.abs(x), nan=-1.0).ravel()), count)[1]


def _float32(w: Array) -> jax.Array:
    return jnp.asarray(w, jnp.float32)


def _check_rank(w: Array, rank: int, limit: int) -> None:
    if w.ndim != 2:
        raise InputError(f"a matrix (in, out) is expected, found the shape {w.shape}: use jax.vmap over leading axes")
    if not 0 <= rank <= limit:
        raise InputError(f"rank is {rank} for a matrix of {w.shape[0]} x {w.shape[1]}: use 0 to {limit}")
