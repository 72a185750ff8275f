"""RAM: add up the changes that one model alone made, and average the changes that several models made; for sparse changes."""

from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax.typing import Array
from merge.leaf import Leaf, Tile, numbers
from merge.method import Method, Option


def ram(leaf: Leaf, *, epsilon: float | Array = 1e-5) -> Any:
    """Return ``t0 + sum_m b_m d_m / max(1, sum_m b_m)``, b_m = |d_m| > epsilon of each element (arXiv 2601.13572)."""
    return leaf.map(_merged, numbers(epsilon), jnp.ones(leaf.count, jnp.float32))


def ramplus_tl(leaf: Leaf, *, r: float | Array = 0.1, alpha: float | Array = 0.2, epsilon: float | Array = 1e-5) -> Any:
    """Return RAM with the changes that model m alone made times ``1 + r * clip(rho_m, 0, alpha)`` (arXiv 2601.13572).

    rho_m is the number of elements of this tensor that model m and others changed, over the number that m alone changed.
    """
    shared, alone = (numbers(counts) for counts in leaf.fold(_counts, numbers(epsilon)))
    ratio = shared / jnp.maximum(alone, numbers(epsilon))
    return leaf.map(_merged, numbers(epsilon), 1 + numbers(r) * jnp.clip(ratio, 0, numbers(alpha)))


def _changed(tile: Tile, epsilon: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Return the mask of each model's changed elements, and the number of models that changed each element."""
    masks = [jnp.abs(delta) > epsilon for delta in tile.deltas]
    return masks, sum((mask.astype(jnp.int32) for mask in masks), jnp.int32(0))


def _counts(tile: Tile, epsilon: jax.Array) -> tuple[jax.Array, jax.Array]:
    masks, count = _changed(tile, epsilon)
    return (
        jnp.stack([jnp.sum(mask & (count > 1), dtype=jnp.uint32) for mask in masks]),
        jnp.stack([jnp.sum(mask & (count == 1), dtype=jnp.uint32) for mask in masks]),
    )


def _merged(tile: Tile, epsilon: jax.Array, factors: jax.Array) -> jax.Array:
    masks, count = _changed(tile, epsilon)
    share = 1 / jnp.maximum(count, 1)
    terms = [
        jnp.where(mask, delta * jnp.where(count == 1, factors[model], share), 0)
        for model, (mask, delta) in enumerate(zip(masks, tile.deltas, strict=True))
    ]
    return tile.origin + sum(terms, jnp.float32(0))


EPSILON = Option(float, 1e-5, "a change up to this magnitude counts as none", 0)

METHODS = {
    "ram": Method(
        ram,
        {},
        {"epsilon": EPSILON},
        "add changes of one model alone, average changes of several; for sparse changes (arXiv 2601.13572)",
    ),
    "ramplus_tl": Method(
        ramplus_tl,
        {},
        {
            "r": Option(float, 0.1, "strength of the factor of the changes of one model alone"),
            "alpha": Option(float, 0.2, "largest ratio of shared to lone changes that counts"),
            "epsilon": EPSILON,
        },
        "ram with larger changes of one model alone, the more it shares with others (arXiv 2601.13572)",
    ),
}
