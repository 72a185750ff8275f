"""SCE: select the elements that differ between models, weigh models by their changes, erase minority signs."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from merge import topk
from merge.leaf import Leaf, Tile
from merge.method import Method, Option
from merge.methods.linear import INT8_MASK
from merge.topk import Selection


def sce(leaf: Leaf, *, select_topk: float = 1.0, int8_mask: bool = False) -> Any:
    """Return the base plus the weighted mean of the selected changes of the majority sign (Wan et al. 2024, arXiv 2408.07990).

    Of the n elements that vary over the models, the ``int(select_topk * n)`` of largest variance are selected. A model's
    weight is the mean square of its selected changes, over the sum of all models' mean squares. The weights are equal where
    that sum is below 1e-6, as in mergekit.
    """
    if select_topk >= 1:
        selection = Selection(jnp.full(1, -1, jnp.float32), jnp.zeros(1, jnp.uint32))
    else:
        varying = jnp.asarray(leaf.fold(_varying), jnp.float32)
        (selection,) = topk.largest(
            [leaf], _variance, [jnp.floor(varying * jnp.float32(select_topk)).astype(jnp.uint32)]
        )
    squares = jnp.asarray(leaf.fold(_squares, selection), jnp.float32) / prod(leaf.shape)
    total = jnp.sum(squares)
    small = total < 1e-6
    weights = jnp.where(small, 1 / leaf.count, squares / jnp.where(small, 1, total))
    return leaf.map(_elected, selection, weights)


def _variance(tile: Tile) -> list[jax.Array]:
    deltas = tile.deltas
    mean = _rounded(sum(deltas, jnp.float32(0)) / len(deltas))
    squares = [_rounded(jnp.square(delta - mean)) for delta in deltas]
    return [sum(squares, jnp.float32(0)) / len(deltas)]


def _rounded(product: jax.Array) -> jax.Array:
    """Return a product rounded to float32 in every program.

    A compiler may fuse the product with a later sum and skip a rounding. The last selected element would then have another
    variance in the comparison than in the search for the threshold, and would be lost. A maximum between product and sum
    prevents the fusion and propagates NaN.
    """
    return jnp.maximum(product, jnp.finfo(jnp.float32).min)


def _varying(tile: Tile) -> jax.Array:
    return jnp.sum(_variance(tile)[0] > 0)


def _selected(tile: Tile, selection: Selection) -> list[jax.Array]:
    mask = selection.mask(0, _variance(tile)[0], tile.positions)
    return [jnp.where(mask, delta, 0) for delta in tile.deltas]


def _squares(tile: Tile, selection: Selection) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.square(delta)) for delta in _selected(tile, selection)])


def _elected(tile: Tile, selection: Selection, weights: jax.Array) -> jax.Array:
    deltas = _selected(tile, selection)
    positive = sum(deltas, jnp.float32(0)) >= 0
    shares = [
        jnp.where(jnp.where(positive, delta > 0, delta < 0), weights[model], 0) for model, delta in enumerate(deltas)
    ]
    total = sum((share * delta for share, delta in zip(shares, deltas, strict=True)), jnp.float32(0))
    return tile.origin + total / jnp.maximum(sum(shares, jnp.float32(0)), 1e-6)


METHODS = {
    "sce": Method(
        sce,
        {},
        {
            "select_topk": Option(
                float,
                1.0,
                "fraction of the varying elements that is selected, the largest variance first",
                0,
                1,
                static=True,
            ),
            "int8_mask": INT8_MASK,
        },
        "select elements by variance, weight models by squared change, erase minority signs (arXiv 2408.07990)",
    )
}
