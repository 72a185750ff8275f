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
    (delta,), base = tile.deltas, tile.origin
    p, q = (jax.nn.softmax(values, axis=-1) for values in (base + delta, base))
    small = jnp.max(jnp.abs(delta), axis=-1, keepdims=True) < 1
    # log sum exp(model) - log sum exp(base)
    near = jnp.log1p(jnp.sum(q * jnp.expm1(jnp.where(small, delta, 0)), axis=-1, keepdims=True))
    far = jax.nn.logsumexp(base + delta, axis=-1, keepdims=True) - jax.nn.logsumexp(base, axis=-1, keepdims=True)
    ratio = delta - jnp.where(small, near, far)  # log p / q
    near = jnp.abs(ratio) < 0.5
    excess = jnp.where(near, q * jnp.expm1(jnp.where(near, ratio, 0)), p - q) / (q + _EPSILON)
    # sum p log(p / q) = sum q f(p / q - 1) with f(x) = (1 + x) log(1 + x) - x >= 0, since both rows have one sum.
    series = jnp.square(excess) * (1 / 2 - excess * (1 / 6 - excess * (1 / 12 - excess * (1 / 20 - excess / 30))))
    whole = (p + _EPSILON) / (q + _EPSILON)
    terms = jnp.where(jnp.abs(excess) < 0.05, series, whole * jnp.log(whole) - excess)
    return jnp.abs(delta) * jnp.sum((q + _EPSILON) * terms, axis=-1, keepdims=True)


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
