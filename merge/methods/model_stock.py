"""Model Stock: interpolate from the base to the models' mean, by the angles between their changes."""

from typing import Any

import jax
import jax.numpy as jnp

from merge.leaf import Leaf, Tile
from merge.method import Method, Option


def model_stock(leaf: Leaf, *, filter_wise: bool = False) -> Any:
    """Return ``t0 + r (mean_m t_m - t0)``, ``r = M c / (1 + (M - 1) c)`` (Jang et al. 2024, arXiv 2403.19522, eq. 3 and 5).

    c is the mean cosine between the changes of two models: of the whole tensor, or of each row (along the last axis) when
    ``filter_wise``. Where the denominator is below 1e-6, for opposite changes, the result is the base.
    """
    if filter_wise:
        return leaf.map(_stocked_rows)
    products = jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), leaf.fold(_products))
    return leaf.map(_stocked, _ratio(*products))


def _products(tile: Tile, axis: int | None = None) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return the squared lengths of the changes, and the scalar product of each pair."""
    deltas = tile.deltas
    pairs = [(i, j) for i in range(len(deltas)) for j in range(i + 1, len(deltas))]
    squares = [jnp.sum(jnp.square(delta), axis=axis) for delta in deltas]
    return squares, [jnp.sum(deltas[i] * deltas[j], axis=axis) for i, j in pairs]


def _stocked_rows(tile: Tile) -> jax.Array:
    return _stocked(tile, _ratio(*_products(tile, -1))[..., None])


def _stocked(tile: Tile, ratio: jax.Array) -> jax.Array:
    deltas = tile.deltas
    return tile.origin + ratio * (sum(deltas, jnp.float32(0)) / len(deltas))


def _ratio(squares: list[jax.Array], products: list[jax.Array]) -> jax.Array:
    lengths, count = [jnp.sqrt(square) for square in squares], len(squares)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = [
        jnp.clip(product / jnp.maximum(lengths[i] * lengths[j], 1e-6), -1, 1)
        for (i, j), product in zip(pairs, products, strict=True)
    ]
    cosine = sum(cosines, jnp.float32(0)) / len(pairs)
    denominator = 1 + (count - 1) * cosine
    singular = jnp.abs(denominator) < 1e-6
    return jnp.where(singular, 0, count * cosine / jnp.where(singular, 1, denominator))


METHODS = {
    "model_stock": Method(
        model_stock,
        {},
        {"filter_wise": Option(bool, False, "use one angle per row, not one per tensor")},
        "interpolate from the base to the mean, by the angles between the changes (arXiv 2403.19522)",
        models=(2, None),
        by_rows=lambda filter_wise=False, **options: filter_wise,
    )
}
