"""Masks of kernels: bool trees at the pruned paths only. True = kept.

A pruned weight is exactly 0.0: masks select and never multiply, so that no -0.0 and no not-a-number is left behind.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Masks, Params


def apply(params: Params, masks: Masks) -> dict[str, jax.Array]:
    """Return ``params`` with every entry whose mask is False set to 0; paths without a mask stay as they are.

    Raises:
      InputError: a mask stands where ``params`` has nothing, or has another shape than its kernel.
    """
    flat = tree.flatten(params)
    for path, mask in tree.flatten(masks).items():
        if path in flat and flat[path].shape != mask.shape:
            raise InputError(f"the mask of {path!r} has the shape {mask.shape}, its kernel {flat[path].shape}")

    def pruned(w: Array, mask: Array) -> Array:
        # What is in memory stays there; a device may be too small for it.
        own = np if isinstance(w, np.ndarray) and isinstance(mask, np.ndarray) else jnp
        return own.where(mask, w, own.zeros((), w.dtype))

    return tree.map_at(pruned, params, masks)


def density(masks: Masks) -> float:
    """Return the kept fraction of all masked entries, in [0, 1]; 1 for an empty tree."""
    flat = tree.flatten(masks).values()
    total = sum(mask.size for mask in flat)
    return sum(int(jnp.count_nonzero(mask)) for mask in flat) / total if total else 1.0


def intersect(a: Masks, b: Masks) -> dict[str, jax.Array]:
    """Return the masks that keep what both keep. A path that is missing in one tree is kept whole by it."""
    left, right = tree.flatten(a), tree.flatten(b)
    both = {path: jnp.logical_and(left[path], right[path]) for path in left if path in right}
    return tree.unflatten(left | right | both)
