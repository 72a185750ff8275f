"""Arcee Fusion: take the model's most important changes, by their magnitude and the divergence of their row."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from merge import topk
from merge.leaf import Leaf, Tile
from merge.method import Method

_EPSILON = 1e-8  # added to each probability, as in mergekit


def arcee_fusion(leaf: Leaf) -> Any:
    """Return the base plus the model's changes whose importance is at least ``q2 + 1.5 (q3 - q1)``, q its quartiles.

    The importance of an element is its |change| times the Kullback-Leibler divergence of the model's row from the base's,
    each row a softmax along the last axis. Quartile i of n elements is the ``i (n - 1) // 4``-th smallest; mergekit draws a
    sample for more than a million elements.
    """
    size = prod(leaf.shape)
    places = [(size - 1) * quarter // 4 for quarter in (1, 2, 3)]
    if places[0]:
        (selection,) = topk.largest([leaf], _importances, [size - place for place in places])
        quartiles = jnp.asarray(selection.threshold)
    else:  # at most 4 elements: one tile, whose fold is the tile itself
        quartiles = jnp.sort(jnp.asarray(leaf.fold(_first, size=size), jnp.float32))[jnp.asarray(places)]
    return leaf.map(_fused, quartiles[1] + 1.5 * (quartiles[2] - quartiles[0]))


def _importances(tile: Tile) -> list[jax.Array]:
    return [_importance(tile)] * 3


def _first(tile: Tile, *, size: int) -> jax.Array:
    return _importance(tile).ravel()[:size]


def _fused(tile: Tile, threshold: jax.Array) -> jax.Array:
    return tile.origin + jnp.where(_importance(tile) >= threshold, tile.deltas[0], 0)


def _importance(tile: Tile) -> jax.Array:
    """Return |change| times the divergence of its row, from differences: rounding would exceed a small divergence itself."""
    (delta,) = tile.deltas
    small = jnp.max(jnp.abs(delta)) < 0.02
    return jnp.abs(delta) * jax.lax.cond(small, _divergence_of_small, _divergence, tile.origin, delta)


# Of rows p and q, sum p log(p / q) = sum q f(p / q - 1) with f(x) = (1 + x) log(1 + x) - x >= 0, since both have one sum.


def _divergence_of_small(base: jax.Array, delta: jax.Array) -> jax.Array:
    """Return the divergence (..., 1) of rows with changes below 0.02, by series."""
    q = jax.nn.softmax(base, axis=-1)
    ratio = delta - jnp.log1p(jnp.sum(q * _expm1(delta), axis=-1, keepdims=True))  # log p / q
    return jnp.sum((q + _EPSILON) * _excess(q * _expm1(ratio) / (q + _EPSILON)), axis=-1, keepdims=True)


def _divergence(base: jax.Array, delta: jax.Array) -> jax.Array:
    p, q = (jax.nn.softmax(values, axis=-1) for values in (base + delta, base))
    small = jnp.max(jnp.abs(delta), axis=-1, keepdims=True) < 1
    # log sum exp(model) - log sum exp(base)
    near = jnp.log1p(jnp.sum(q * jnp.expm1(jnp.where(small, delta, 0)), axis=-1, keepdims=True))
    far = jax.nn.logsumexp(base + delta, axis=-1, keepdims=True) - jax.nn.logsumexp(base, axis=-1, keepdims=True)
    ratio = delta - jnp.where(small, near, far)
    near = jnp.abs(ratio) < 0.5
    change = jnp.where(near, q * jnp.expm1(jnp.where(near, ratio, 0)), p - q) / (q + _EPSILON)
    whole = (p + _EPSILON) / (q + _EPSILON)
    terms = jnp.where(jnp.abs(change) < 0.05, _excess(change), whole * jnp.log(whole) - change)
    return jnp.sum((q + _EPSILON) * terms, axis=-1, keepdims=True)


def _expm1(x: jax.Array) -> jax.Array:
    """Return exp(x) - 1 for |x| < 0.05."""
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))


def _excess(x: jax.Array) -> jax.Array:
    """Return (1 + x) log(1 + x) - x for |x| < 0.05."""
    return jnp.square(x) * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x / 30))))


METHODS = {
    "arcee_fusion": Method(
        arcee_fusion,
        {},
        {},
        "take one model's most important changes, by magnitude and the divergence of their row (Arcee Fusion)",
        models=(1, 1),
        by_rows=lambda **options: True,
    )
}
