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
from merge.methods.sparsify import EACH, Sparsifier, Weights, check, kept_count, merge_sparse, shared_options
from merge.topk import Cut


def breadcrumbs(
    leaf: Leaf, *, weight: Weights, density: Sequence[float], gamma: Sequence[float], elect: bool, **options: Any
) -> Any:
    """Return the merge without the largest and smallest changes (Davari & Belilovsky 2023, arXiv 2312.06795).

    The ``int(gamma * n)`` largest are dropped, then the smallest, so that ``max(1, int(density * n))`` are kept; fewer of the
    largest are dropped where too few would be left. The other options are those of `merge.methods.sparsify.merge_sparse`.
    """
    size = prod(leaf.shape)
    kept = [kept_count(share, size) for share in density]
    top = [min(int(share * size), size - count) for share, count in zip(gamma, kept, strict=True)]
    upto = [count + largest for count, largest in zip(kept, top, strict=True)]
    (cut,) = topk.largest([leaf], _magnitudes_twice, [*upto, *top])
    return merge_sparse(leaf, Sparsifier(_banded, cut), weight, elect=elect, **options)


def _banded(tile: Tile, cut: Cut) -> list[jax.Array]:
    positions, count = tile.positions, len(tile.models)

    def kept(model: int, size: jax.Array) -> jax.Array:
        return cut.kept(model, size, positions) & ~cut.kept(model + count, size, positions)

    return [jnp.where(kept(model, jnp.abs(delta)), delta, 0) for model, delta in enumerate(tile.deltas)]


def _magnitudes_twice(tile: Tile) -> list[jax.Array]:
    return 2 * topk.magnitudes(tile)


def _method(*, elect: bool) -> Method:
    return Method(
        partial(breadcrumbs, elect=elect),
        {**EACH, "gamma": Option(float, 0.01, "fraction of the largest changes dropped", 0, 1)},
        shared_options(normalize=False, rescale=False),
        f"drop the largest and the smallest changes, {'then elect signs' if elect else 'then sum'} (arXiv 2312.06795)",
        check=partial(check, elect=elect),
    )


METHODS = {"breadcrumbs_ties": _method(elect=True), "breadcrumbs": _method(elect=False)}
