"""NearSwap: take the model where its change from the base is small."""

from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax.typing import Array
from merge.leaf import Leaf, Tile, numbers
from merge.method import Method, Option


def nearswap(leaf: Leaf, *, t: float | Array) -> Any:
    """Return ``t0 + min(1, t / |d|) d``: each change d, limited to a magnitude of ``t``."""
    return leaf.map(_swapped, numbers(t))


def _swapped(tile: Tile, t: jax.Array) -> jax.Array:
    (delta,) = tile.deltas
    share = jnp.clip(t / jnp.maximum(jnp.abs(delta), 1e-6), 0, 1)
    return share * tile.values[0] + (1 - share) * tile.origin


METHODS = {
    "nearswap": Method(
        nearswap,
        {},
        {"t": Option(float, None, "largest change that is taken in full", 0)},
        "base plus the changes of one model, each limited to t",
        models=(1, 1),
    )
}
