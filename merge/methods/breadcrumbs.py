"""Breadcrumbs: drop each model's largest and smallest changes."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from merge import topk
from merge.leaf import Leaf, Tile
from merge.method import Method, Option
from merge.methods.sparse_sum import COUNTED, Sparsifier, Weights, merge_sparse, shared_options
from merge.topk import Selection


def breadcrumbs(
    leaf: Leaf, *, weight: Weights, density: Sequence[float], gamma: Sequence[float], elect: bool, **options: Any
) -> Any:
    """Return the merge without the largest and smallest changes (Davari & Belilovsky 2023, arXiv 2312.06795).

    The ``int(gamma * n)`` largest changes are dropped, then the smallest changes until ``int(density * n)`` are left, which
    is none of a small tensor; fewer of the largest are dropped where too few would be left. The other options are those of
    `merge.methods.sparse_sum.merge_sparse`.
    """
    size = prod(leaf.shape)
    counts = [int(share * size) for share in density]
    dropped = [min(int(share * size), size - count) for share, count in zip(gamma, counts, strict=True)]
    both = [count + largest for count, largest in zip(counts, dropped, strict=True)]
    (selection,) = topk.largest([leaf], _magnitudes_twice, [*both, *dropped])
    return merge_sparse(leaf, Sparsifier(_middle, selection), weight, elect=elect, **options)


def _middle(tile: Tile, selection: Selection) -> list[jax.Array]:
    positions, count = tile.positions, len(tile.models)

    def mask(model: int, size: jax.Array) -> jax.Array:
        return selection.mask(model, size, positions) & ~selection.mask(model + count, size, positions)

    return [jnp.where(mask(model, jnp.abs(delta)), delta, 0) for model, delta in enumerate(tile.deltas)]


def _magnitudes_twice(tile: Tile) -> list[jax.Array]:
    return 2 * topk.magnitudes(tile)


def _method(*, elect: bool) -> Method:
    return Method(
        partial(breadcrumbs, elect=elect),
        {
            **COUNTED,
            "gamma": Option(
                float, 0.01, "fraction of the model's changes that is dropped for being the largest", 0, 1, static=True
            ),
        },
        shared_options(normalize=False, rescale=False),
        f"drop the largest and smallest changes, {'elect signs, then sum' if elect else 'then sum'} (arXiv 2312.06795)",
    )


METHODS = {"breadcrumbs_ties": _method(elect=True), "breadcrumbs": _method(elect=False)}
