"""TIES: keep each model's largest changes, elect the sign of each element, average the changes of that sign."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from merge import topk
from merge.leaf import Leaf, Tile
from merge.method import Method, Option
from merge.methods.sparse_sum import COUNTED, Sparsifier, Weights, kept_count, merge_sparse, shared_options
from merge.topk import Selection


def ties(
    leaf: Leaf,
    *,
    weight: Weights,
    density: Sequence[float],
    trim_ties: str = "order",
    selection: Selection | None = None,
    **options: Any,
) -> Any:
    """Return the base plus the mean of the largest changes of the elected sign (Yadav et al. 2023, arXiv 2306.01708).

    Args:
      leaf: one tensor.
      weight: (models,).
      density: (models,) in [0, 1], the fraction of changes kept; 0 keeps none.
      trim_ties: ``order`` keeps exactly ``max(1, int(density * n))`` elements, the first among equal elements; ``keep`` keeps
        all elements at or above the ``int((1 - density) * n)``-th smallest, as the authors' code does.
      selection: from `trims`, over the whole model; None: over this tensor.
      **options: see `merge.methods.sparse_sum.merge_sparse`.
    """
    if selection is None:
        size = prod(leaf.shape)
        counts = [_trimmed_count(share, size, trim_ties) for share in density]
        (selection,) = topk.largest([leaf], topk.magnitudes, counts, every_tie=trim_ties == "keep")
    return merge_sparse(leaf, Sparsifier(_trimmed, selection), weight, elect=True, **options)


def trims(leaves: Sequence[Leaf], options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the keywords ``selection``, over all leaves with ``trim: global``, for each of these leaves; none for others."""
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
        selections = topk.largest([leaves[n] for n in chosen], topk.magnitudes, counts, every_tie=rule == "keep")
        for number, selection in zip(chosen, selections, strict=True):
            extras[number] = {"selection": selection}
    return extras


def _trimmed(tile: Tile, selection: Selection) -> list[jax.Array]:
    positions = tile.positions
    return [
        jnp.where(selection.mask(model, jnp.abs(delta), positions), delta, 0) for model, delta in enumerate(tile.deltas)
    ]


def _trimmed_count(share: float, size: int, trim_ties: str) -> int:
    if share <= 0 or trim_ties == "order":
        return kept_count(share, size)
    return min(size, size - int((1 - share) * size) + 1)


METHODS = {
    "ties": Method(
        ties,
        COUNTED,
        {
            **shared_options(normalize=True, rescale=False),
            "trim": Option(
                str,
                "tensor",
                "trim the changes of each tensor, or of the model as a whole",
                choices=("tensor", "global"),
            ),
            "vote": Option(
                str,
                "weighted",
                "elect the sign of the sum of the weighted, or unweighted, changes",
                choices=("weighted", "unweighted"),
            ),
            "trim_ties": Option(
                str,
                "order",
                "among equal changes at the threshold, keep the first, or keep all as the authors' code does",
                choices=("order", "keep"),
            ),
        },
        "keep the largest changes, elect signs, average the changes of the elected sign (arXiv 2306.01708)",
        prepare=trims,
    )
}
