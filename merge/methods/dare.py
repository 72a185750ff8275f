"""DARE: drop changes at random, independent of their size."""

from functools import partial
from typing import Any

import jax

from merge.leaf import Leaf, Tile, numbers
from merge.method import Method
from merge.methods.sparse_sum import (
    EACH,
    RANDOM,
    Sparsifier,
    Weights,
    draw,
    key_words,
    merge_sparse,
    shared_options,
)


def dare(
    leaf: Leaf,
    *,
    weight: Weights,
    density: Weights,
    elect: bool,
    seed: int = 0,
    rescale: bool = True,
    rescale_norm: str = "l1",
    **options: Any,
) -> Any:
    """Return the merge of changes that are kept with probability ``density`` (Yu et al. 2024, arXiv 2311.03099).

    ``rescale`` makes up for the dropped changes: ``rescale_norm`` ``l1`` restores the sum of |change|, ``inverse`` divides by
    ``density`` (the paper's). The other options are those of
    `merge.methods.sparse_sum.merge_sparse`.
    """
    inverse = rescale and rescale_norm == "inverse"
    rule = (key_words(leaf, seed), numbers(density))
    sparsifier = Sparsifier(_dropped_inverse if inverse else _dropped, rule)
    return merge_sparse(leaf, sparsifier, weight, elect=elect, rescale=rescale and not inverse, **options)


def _dropped(tile: Tile, rule: tuple[jax.Array, jax.Array], *, inverse: bool = False) -> list[jax.Array]:
    words, densities = rule
    return [
        draw(delta, densities[model], words[model], tile.positions, inverse=inverse)
        for model, delta in enumerate(tile.deltas)
    ]


def _dropped_inverse(tile: Tile, rule: Any) -> list[jax.Array]:
    return _dropped(tile, rule, inverse=True)


def _method(*, elect: bool) -> Method:
    return Method(
        partial(dare, elect=elect),
        EACH,
        {**shared_options(normalize=False, rescale=True), **RANDOM},
        f"drop changes at random, {'elect signs, then sum' if elect else 'then sum'} (arXiv 2311.03099)",
        exact=False,
    )


METHODS = {"dare_ties": _method(elect=True), "dare_linear": _method(elect=False)}
