"""Decompositions of one matrix: low rank plus a few spikes (GreBsmo), and truncated singular value decompositions.

`grebsmo` is the decomposition of DSEE (arXiv 2111.00160, section 3.2, after Zhou and Tao's greedy bilateral smoothing), which
updates U, V and S in turn. It differs from the authors' code in three points:

- The rank is at most half of the smaller side, so that a residual is left for S. The full rank is used from the first round:
  entries that enter S while the rank is too low are slow to leave S.
- S holds the ``nonzeros`` entries that stand out most, by an exact top-k instead of a threshold that few entries may pass.
- A low-rank part with spare rank would fit the spikes and hide them. Each round therefore splits the columns at random into
  two halves, and the basis fitted to one half predicts the other: a spike takes no part in its own prediction. The residual
  is divided by its standard deviation under noise (a studentised residual), because a row that dominates the basis leaves a
  small residual.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Key

ROUNDS = 10
"""Rounds of updates of U, V and S."""

_LEAST_FREE = 0.5
"""The smallest divisor of a residual that becomes a value of S; a smaller divisor could turn noise into a spike."""

_LEAST_SHARE = 1e-4
"""The smallest share of the variance of a row that a basis leaves; rounding makes smaller shares meaningless."""

_BLOCK = 48
"""The largest size of triangular matrices that are inverted by solving."""

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
    """Approximate `svd` at a small part of its cost (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).

    Args:
      w: (in, out).
      rank: the number of singular values.
      key: draws the test matrix.
      oversample: columns of the test matrix beyond ``rank``; the total is at most min(in, out).
      iterations: power iterations; slowly falling singular values need more.

    Raises:
      InputError: rank is not within 0 .. min(in, out).
    """
    _check_rank(w, rank, min(w.shape))
    with jax.default_matmul_precision("highest"):
        w = _float32(w)
        noise = jax.random.normal(key, (w.shape[1], min(rank + oversample, *w.shape)), jnp.float32)
        basis = jnp.linalg.qr(w @ noise)[0]
        for _ in range(iterations):
            basis = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ basis)[0])[0]
        u, s, v = jnp.linalg.svd(basis.T @ w, full_matrices=False)
        return (basis @ u)[:, :rank], s[:rank], v[:rank]


@functools.partial(jax.jit, static_argnames=("rank", "nonzeros"))
def grebsmo(w: Array, rank: int, nonzeros: int = 64, *, key: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split a matrix into ``u @ v + s`` and a small rest.

    Args:
      w: (in, out), any floating dtype; the computation is float32.
      rank: the rank of ``u @ v``, from 0 to half of the smaller side.
      nonzeros: the number of entries of ``s``.
      key: draws the initial basis and the halves.

    Returns:
      ``u`` (in, rank) with orthonormal columns, ``v`` (rank, out), and ``s`` (in, out), which is ``w - u @ v`` at `spikes`
      and 0 elsewhere.

    Raises:
      InputError: rank or nonzeros is out of range.
    """
    index = spikes(w, rank, nonzeros, key=key)
    with jax.default_matmul_precision("highest"):
        w = _float32(w)
        support = jnp.zeros(w.size, bool).at[index].set(True).reshape(w.shape)
        u = jax.random.normal(jax.random.fold_in(key, 1), (w.shape[0], rank), jnp.float32)

        def turn(_: int, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            u, s = parts[0], parts[2]
            u = jnp.linalg.qr((w - s) @ jnp.linalg.qr((w - s).T @ u)[0])[0]
            v = u.T @ (w - s)
            return u, v, jnp.where(support, w - u @ v, 0)

        u, v, s = jax.lax.fori_loop(0, ROUNDS, turn, (u, u.T @ w, jnp.zeros_like(w)))
        return u, v, s


@functools.partial(jax.jit, static_argnames=("rank", "nonzeros"))
def spikes(w: Array, rank: int, nonzeros: int, *, key: Key) -> jax.Array:
    """Return the ``nonzeros`` different flat indices where ``w`` (in, out) stands out most from a low-rank matrix.

    The index that stands out most comes first. Arguments and errors are those of `grebsmo`. For rank 0 the result is the
    indices of the largest ``|w|``. Memory: a few times ``w``. All steps are matrix products, small Cholesky factors or a
    top-k, and run well under ``jax.vmap`` over many matrices.
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
    bases = jax.random.normal(start, (2, w.shape[0], rank), jnp.float32)
    with jax.default_matmul_precision("highest"):
        _, indices = jax.lax.scan(
            lambda carry, key: _round(w, carry[0], carry[1], nonzeros, key), (bases, jnp.zeros_like(w)), jnp.stack(keys)
        )
    return indices[-1]


def _round(w: jax.Array, bases: jax.Array, s: jax.Array, nonzeros: int, key: Key):
    """Update U, V and S once; ``bases`` (2, in, rank) holds one basis for each half of the columns.

    The barriers keep XLA's CPU compiler from recomputing a gather or a sum in each of its consumers: four times faster.
    """
    columns = w.shape[1]
    half = columns // 2
    order = jax.random.permutation(key, columns)
    back = jnp.argsort(order)
    clean = _barrier(jnp.take(w - s, order, axis=1))
    left, right = clean[:, :half], clean[:, half:]
    bases = _barrier(_fit(jnp.stack([left, right[:, -half:]]), bases))
    rest = jnp.concatenate([_without(left, bases[1]), _without(right, bases[0])], axis=1)
    # A basis fitted to other columns leaves the share `free` of the variance of a noise entry in row i.
    free = jnp.maximum(1 - jnp.sum(bases * bases, axis=2), _LEAST_SHARE)
    free = jnp.where((back < half)[None, :], free[1][:, None], free[0][:, None])
    free, rest = _barrier((free, jnp.take(rest, back, axis=1)))
    index = _largest(s * jnp.sqrt(free) + rest / jnp.sqrt(free), nonzeros)
    values = (s + rest / jnp.maximum(free, _LEAST_FREE)).ravel()[index]
    return (bases, jnp.zeros(w.size, w.dtype).at[index].set(values).reshape(w.shape)), index


def _fit(x: jax.Array, u: jax.Array) -> jax.Array:
    """Return bases of the column spaces of a stack ``x`` (n, in, columns): one power iteration from ``u`` (n, in, rank)."""
    return _orthonormal(x @ _orthonormal(_transposed(x) @ u, 1), 2)


def _without(x: jax.Array, u: jax.Array) -> jax.Array:
    return x - u @ (u.T @ x)


def _orthonormal(x: jax.Array, passes: int) -> jax.Array:
    """Orthonormalise columns by repeated shifted Cholesky-QR (Fukaya et al. 2020), which is made of matrix products."""
    tiny, eps = jnp.finfo(x.dtype).tiny, jnp.finfo(x.dtype).eps
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True), tiny)
    eye = jnp.eye(x.shape[2], dtype=x.dtype)[None]
    for _ in range(passes):
        gram = _transposed(x) @ x
        shift = eps * jnp.trace(gram, axis1=1, axis2=2) + tiny
        x = x @ _transposed(_inverse(jnp.linalg.cholesky(gram + shift[:, None, None] * eye)))
    return x


def _inverse(lower: jax.Array) -> jax.Array:
    """Invert lower triangular matrices (n, size, size), mostly by products: solving is ten times slower on a CPU.

    One call solves all diagonal blocks, which then merge in pairs. One call per block would deadlock: in jaxlib 0.10, batched
    LAPACK calls without an order between them wait for each other's threads. Both halves are stacked for the same reason.
    """
    size = lower.shape[1]
    levels = max(0, math.ceil(math.log2(size / _BLOCK)))
    width = -(-size // 2**levels)
    spare = jnp.arange(size, width << levels)
    lower = jnp.pad(lower, ((0, 0), (0, len(spare)), (0, len(spare)))).at[:, spare, spare].set(1)

    def blocks(width: int, row: int, step: int) -> jax.Array:
        """Return the blocks of ``width`` that lie ``row`` below the diagonal, one every ``step`` along the diagonal."""
        starts = range(0, lower.shape[1] - row, step)
        return jnp.stack([lower[:, i + row : i + row + width, i : i + width] for i in starts], axis=1)

    diagonal = blocks(width, 0, width)
    eye = jnp.broadcast_to(jnp.eye(width, dtype=lower.dtype), diagonal.shape)
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
        raise InputError(f"expected a matrix (in, out), found the shape {w.shape}: use jax.vmap over leading axes")
    if not 0 <= rank <= limit:
        raise InputError(f"rank is {rank} for a matrix of {w.shape[0]} x {w.shape[1]}: use 0 to {limit}")
