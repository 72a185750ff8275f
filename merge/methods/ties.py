"""TIES: keep each model's largest changes, elect the sign of each element, average the changes of that sign."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from merge import topk
from merge.leaf import Leaf, Tile
from merge.method import Method, Option
from merge.methods.sparsify import EACH, Sparsifier, Weights, kept_count, merge_sparse, shared_options
from merge.topk import Cut


def ties(
    leaf: Leaf,
    *,
    weight: Weights,
    density: Sequence[float],
    trim_ties: str = "order",
    cut: Cut | None = None,
    **options: Any,
) -> Any:
    """Return the base plus the mean of the largest changes of the elected sign (Yadav et al. 2023, arXiv 2306.01708).

    Args:
      leaf: one tensor.
      weight: (models,).
      density: (models,) in (0, 1], the fraction of changes kept.
      trim_ties: ``order`` keeps exactly ``max(1, int(density * n))`` elements, of equal elements the first; ``keep`` keeps
        all elements at or above the ``int((1 - density) * n)``-th smallest, as the authors' code does.
      cut: from `trims`, over the whole model; default: over this tensor.
      **options: see `merge.methods.sparsify.merge_sparse`.
    """
    if cut is None:
        size = prod(leaf.shape)
        counts = [_trimmed_count(share, size, trim_ties) for share in density]
        (cut,) = topk.largest([leaf], topk.magnitudes, counts, every_tie=trim_ties == "keep")
    return merge_sparse(leaf, Sparsifier(_trimmed, cut), weight, elect=True, **options)


def trims(leaves: Sequence[Leaf], options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each leaf the `Cut` over all leaves with ``trim: global``, as keyword ``cut``; nothing for other leaves."""
    chosen = [number for number, keywords in enumerate(options) if keywords.get("trim") == "global"]
    extras: list[dict[str, Any]] = [{} for _ in leaves]
    if chosen:
        rule = options[chosen[0]].get("trim_ties", "order")
        size = sum(prod(leaves[number].shape) for number in chosen)
        shares = [
            sum(prod(leaves[n].shape) * options[n]["density"][model] for n in chosen) / size
            for model in range(leaves[chosen[0]].count)
        ]
        counts = [_trimmed_count(share, size, rule) for share in shares]
        cuts = topk.largest([leaves[n] for n in chosen], topk.magnitudes, counts, every_tie=rule == "keep")
        for number, cut in zip(chosen, cuts, strict=True):
            extras[number] = {"cut": cut}
    return extras


def _trimmed(tile: Tile, cut: Cut) -> list[jax.Array]:
    positions = tile.positions
    return [jnp.where(cut.kept(model, jnp.abs(delta), positions), delta, 0) for model, delta in enumerate(tile.deltas)]


def _trimmed_count(share: float, size: int, trim_ties: str) -> int:
    return kept_count(share, size) if trim_ties == "order" else min(size, size - int((1 - share) * size) + 1)


METHODS = {
    "ties": Method(
        ties,
        EACH,
        {
            **shared_options(normalize=True, rescale=False),
            "trim": Option(str, "tensor", "trim each tensor, or over the whole model", choices=("tensor", "global")),
            "vote": Option(str, "weighted", "elect on weighted changes or not", choices=("weighted", "unweighted")),
            "trim_ties": Option(
                str, "order", "of equal changes keep the first, or keep all (the authors')", choices=("order", "keep")
            ),
        },
        "trim, elect signs, average what agrees (arXiv 2306.01708)",
        prepare=trims,
    )
}
