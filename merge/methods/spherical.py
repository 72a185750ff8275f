"""Interpolation on spheres: SLERP, NuSLERP, Multi-SLERP and the Karcher mean.

Each result is a linear combination of the models. The coefficients come from the models' lengths and distances: models of one
base are so close together that their scalar products in float32 would equal their squared lengths.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsee_jax.typing import Array
from merge.leaf import Leaf, Tile
from merge.method import Method, Option
from merge.methods import linear

Weights = Sequence[float] | Array


class Spread(NamedTuple):
    """The squared length of each vector, and the squared distance of each pair (i, j), i < j, in that order."""

    lengths: Any
    distances: Any


def measure(vectors: Sequence[jax.Array], axes: tuple[int, ...] | None = None) -> Spread:
    """Return the `Spread` of ``vectors`` along ``axes`` (None: all); its arrays have the shape of the other axes."""

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(values), axis=axes)

    pairs = [(i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    return Spread([total(v) for v in vectors], [total(vectors[i] - vectors[j]) for i, j in pairs])


def slerp(leaf: Leaf, *, t: float | Array) -> Any:
    """Return the point at ``t`` on the arc from the base (t = 0) to the model (t = 1), as one vector (Shoemake 1985).

    Where the cosine is above 0.9995 in magnitude, the interpolation is linear.
    """
    return leaf.map(_interpolated_inputs, *_arc(_folded(leaf.fold(_measure_inputs)), t, least=1e-8, straight=0.9995))


def nuslerp(leaf: Leaf, *, weight: Weights, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False) -> Any:
    """Return two models, or with a base their changes, interpolated at ``t = w_2 / (w_1 + w_2)``.

    ``t`` is 1/2 where the weights sum to less than 1e-6. The vectors are the tensor with ``nuslerp_flatten``, else its rows
    (along the last axis), or with ``nuslerp_row_wise``, which is mergekit's name, its columns (along all other axes).
    """
    first, second = jnp.asarray(weight, jnp.float32)
    total = first + second
    t = jnp.where(jnp.abs(total) < 1e-6, 0.5, second / jnp.where(total == 0, 1, total))
    if not (nuslerp_flatten or nuslerp_row_wise):
        return leaf.map(_interpolated_rows, t)
    fold = _measure_changes if nuslerp_flatten or len(leaf.shape) < 2 else _measure_columns
    return leaf.map(_interpolated, *_arc(_folded(leaf.fold(fold)), t))


def multislerp(leaf: Leaf, *, weight: Weights, normalize_weights: bool = True, eps: float = 1e-8) -> Any:
    """Return the weighted mean direction of the models, or of their changes, at the weighted mean length.

    mergekit also averages in the tangent space at that direction, where the mean is zero: the results are equal. Where the
    directions cancel, the result is the weighted sum.
    """
    weights = jnp.asarray(weight, jnp.float32)
    if normalize_weights:
        weights = weights / jnp.sum(weights)
    if leaf.count == 1:
        return leaf.map(linear.weighted, jnp.ones(1, jnp.float32))
    return leaf.map(linear.moved, _direction(_folded(leaf.fold(_measure_changes)), weights, jnp.float32(eps)))


def karcher(leaf: Leaf, *, max_iter: int = 10, tol: float = 1e-5) -> Any:
    """Return the mean direction on the sphere (Karcher 1977; arXiv 2603.04972) at the mean length of the models.

    The iteration stops when the mean tangent is shorter than ``tol``, or after ``max_iter`` steps.
    """
    if leaf.count == 1:
        return leaf.map(linear.weighted, jnp.ones(1, jnp.float32))
    return leaf.map(linear.weighted, _karcher(_folded(leaf.fold(_measure_models)), jnp.float32(tol), steps=max_iter))


def _folded(sums: Any) -> Any:
    return jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), sums)


def _measure_inputs(tile: Tile) -> Spread:
    return measure([tile.origin, *tile.values])


def _measure_models(tile: Tile) -> Spread:
    return measure(tile.values)


def _measure_changes(tile: Tile) -> Spread:
    return measure(tile.deltas)


def _measure_columns(tile: Tile) -> Spread:
    return measure(tile.deltas, tuple(range(tile.models[0].ndim - 1)))


def _interpolated_rows(tile: Tile, t: jax.Array) -> jax.Array:
    factors = _arc(measure(tile.deltas, (-1,)), t)
    return _interpolated(tile, *(part[..., None] for part in factors))


def _interpolated(tile: Tile, first: jax.Array, second: jax.Array) -> jax.Array:
    a, b = tile.deltas
    factors = [
        part.reshape((1,) * (a.ndim - part.ndim) + part.shape) if part.ndim else part for part in (first, second)
    ]
    return tile.origin + (factors[0] * a + factors[1] * b)


def _interpolated_inputs(tile: Tile, first: jax.Array, second: jax.Array) -> jax.Array:
    return first * tile.origin + second * tile.values[0]


def _arc(spread: Spread, t: Any, *, least: float = 1e-7, straight: float | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the factors of two vectors for the point at ``t`` on the arc between them, or on the line if the arc is straight.

    A vector no longer than ``least`` counts as orthogonal to any other, as in mergekit.
    """
    t = jnp.asarray(t, jnp.float32)
    (first, second), (distance,) = spread
    short = (first <= least**2) | (second <= least**2)
    a, b = (jnp.sqrt(jnp.where(short, 1, square)) for square in (first, second))
    ratio = jnp.square(a - b) / (4 * a * b)
    sine = jnp.where(short, 0.5, jnp.clip(distance / (4 * a * b) - ratio, 0, 1))  # sin^2(angle / 2)
    # Vectors that are opposite in float32 have no unique arc; equal vectors need no arc.
    line = (sine < 1e-9) | (1 - sine < 1e-6 * (1 + ratio))
    if straight is not None:
        line = jnp.abs(1 - 2 * sine) > straight
    sine = jnp.where(line, 0.5, sine)
    angle = 2 * jnp.arctan2(jnp.sqrt(sine), jnp.sqrt(1 - sine))
    below = 2 * jnp.sqrt(sine * (1 - sine))
    return (
        jnp.where(line, 1 - t, jnp.sin((1 - t) * angle) / below),
        jnp.where(line, t, jnp.sin(t * angle) / below),
    )


def _squares(spread: Spread, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the squared lengths (models,) and distances (models, models) of the vectors times ``scales`` (models,)."""
    lengths, count = jnp.stack(spread.lengths), len(spread.lengths)
    rows, columns = jnp.triu_indices(count, 1)
    norms = jnp.sqrt(lengths)
    turned = jnp.maximum(jnp.stack(spread.distances) - jnp.square(norms[rows] - norms[columns]), 0)
    scaled = norms * scales
    pairs = turned * scales[rows] * scales[columns] + jnp.square(scaled[rows] - scaled[columns])
    square = jnp.zeros((count, count), jnp.float32).at[rows, columns].set(pairs)
    return jnp.square(scaled), square + square.T


def _length(weights: jax.Array, lengths: jax.Array, distances: jax.Array) -> jax.Array:
    """Return |sum_m w_m u_m| from the squared lengths and distances of the vectors u."""
    square = (
        jnp.sum(weights) * jnp.sum(weights * lengths) - jnp.sum(weights[:, None] * weights[None, :] * distances) / 2
    )
    # The gradient at zero is zero instead of infinite.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


@jax.jit
def _direction(spread: Spread, weights: jax.Array, eps: jax.Array) -> jax.Array:
    norms = jnp.sqrt(jnp.stack(spread.lengths))
    scales = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms + eps, 1), 0)
    mean = _length(weights, *_squares(spread, scales))
    # Rounding in float32 leaves up to this length of a sum that is exactly zero.
    balanced = mean <= jnp.maximum(eps, 1e-3 * jnp.sum(jnp.abs(weights)))
    turned = jnp.sum(norms * weights) * weights * scales / jnp.where(balanced, 1, mean)
    return jnp.where(balanced, weights, turned)


@partial(jax.jit, static_argnames="steps")
def _karcher(spread: Spread, tol: jax.Array, *, steps: int) -> jax.Array:
    """Return the coefficients (models,) of the models. A point is stored as its coefficients over the unit vectors."""
    norms = jnp.sqrt(jnp.stack(spread.lengths))
    count = norms.shape[0]
    valid = norms > tol
    scales = jnp.where(valid, 1 / jnp.where(valid, norms, 1), 0)
    shares = jnp.where(valid, 1.0, 0.0) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
    lengths, distances = _squares(spread, scales)
    units = jnp.where(valid, 1.0, lengths)

    def unit(point: jax.Array, otherwise: jax.Array, least: Any) -> jax.Array:
        length = _length(point, units, distances)
        return jnp.where(length > least, point / jnp.where(length > least, length, 1), otherwise)

    def improve(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        point, done = state
        # <p, u_j> of two unit vectors, from |p - u_j|.
        away = jax.vmap(lambda vector: _length(point - vector, units, distances))(jnp.eye(count, dtype=jnp.float32))
        cosines = jnp.clip(1 - jnp.square(away) / 2, -1, 1)
        half = jnp.clip(away / 2, 0, 1)
        angles = 2 * jnp.arctan2(half, jnp.sqrt(1 - jnp.square(half)))
        # From the opposite point, no direction is the shortest.
        still = (angles < tol) | (cosines < -1 + 1e-6)
        pulls = jnp.where(still, 0, shares * angles / jnp.where(still, 1, jnp.sin(angles)))
        tangent = pulls - jnp.sum(pulls * cosines) * point
        length = _length(tangent, units, distances)
        done = done | (length < tol)
        moved = jnp.cos(length) * point + jnp.sin(length) * tangent / jnp.where(length > 0, length, 1)
        return jnp.where(done, point, unit(moved, moved, tol)), done

    first = jax.nn.one_hot(jnp.argmax(valid), count, dtype=jnp.float32)
    start = unit(shares, first, tol)
    point, _ = jax.lax.fori_loop(0, steps, improve, (start, jnp.asarray(False)))
    return jnp.mean(norms) * point * scales


def _check_multislerp(where: str, *, weight: Any, normalize_weights: Any = True, **others: Any) -> None:
    linear.check(where, weight=weight, normalize=normalize_weights)


T = Option(float, None, "position on the arc: 0 is the base, 1 the model")

METHODS = {
    "slerp": Method(
        slerp,
        {},
        {"t": T},
        "spherical interpolation from the base to one model (Shoemake 1985)",
        base="required",
        models=(1, 1),
    ),
    "nuslerp": Method(
        nuslerp,
        {"weight": linear.WEIGHT},
        {
            "nuslerp_flatten": Option(bool, True, "interpolate each tensor as one vector"),
            "nuslerp_row_wise": Option(bool, False, "without nuslerp_flatten: interpolate columns, not rows"),
        },
        "spherical interpolation between two models, or between their changes",
        base="optional",
        models=(2, 2),
        by_rows=lambda nuslerp_flatten=True, **options: not nuslerp_flatten,
    ),
    "multislerp": Method(
        multislerp,
        {"weight": linear.WEIGHT},
        {
            "normalize_weights": Option(bool, True, linear.NORMALIZE),
            "eps": Option(
                float, 1e-8, "added to lengths in denominators; a mean direction no longer than this counts as zero", 0
            ),
        },
        "weighted mean direction of the models or of their changes, at their mean length",
        base="optional",
        check=_check_multislerp,
    ),
    "karcher": Method(
        karcher,
        {},
        {
            "max_iter": Option(int, 10, "maximum number of iterations", 1, 10000),
            "tol": Option(float, 1e-5, "stop when the mean moves by less than this angle", 0),
        },
        "Karcher mean on the sphere (arXiv 2603.04972)",
        base="none",
    ),
}
