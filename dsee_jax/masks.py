"""Masks of kernels: bool trees at the pruned paths only. True = kept.

A pruned weight is exactly 0.0: masks select and never multiply, so no -0.0 and no NaN remains.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Masks

T = TypeVar("T")


def apply(params: T, masks: Masks) -> T:
    """Return ``params`` with every entry whose mask is False set to 0; paths without a mask are unchanged.

    ``params`` is any pytree; its structure, containers and boxes are kept.

    Raises:
      InputError: a mask has no kernel in ``params``, or another shape than its kernel.
    """
    flat = tree.flatten(params)

    def pruned(path: str, mask: Array) -> Array:
        w = tree.lookup(flat, path)
        if w.shape != mask.shape:
            raise InputError(f"the mask of {path!r} has the shape {mask.shape}, its kernel {w.shape}")
        # NumPy arrays stay on the host; a device may be too small for them.
        numpy = np if isinstance(w, np.ndarray) and isinstance(mask, np.ndarray) else jnp
        return numpy.where(mask, w, numpy.zeros((), w.dtype))

    return tree.replace(params, {path: pruned(path, mask) for path, mask in tree.flatten(masks).items()})


INT32 = 2**31
"""The entries that an int32 cannot count. A stacked kernel of a deep decoder has more."""


def parts(shape: Sequence[int], most: int = INT32) -> int:
    """Return the number of leading axes to go through one by one, so that each part has fewer than ``most`` entries."""
    return next(axes for axes in range(len(shape) + 1) if math.prod(shape[axes:]) < most)


def counts(mask: jax.Array, most: int = INT32) -> jax.Array:
    """Return the number of True entries of every part of a mask, int32 of the shape of its leading axes (`parts`).

    Their sum may exceed an int32: add them as Python or NumPy int64 numbers.
    """
    leading = parts(mask.shape, most)
    return jnp.sum(mask, axis=tuple(range(leading, mask.ndim)), dtype=jnp.int32)


def density(masks: Masks) -> float:
    """Return the kept fraction of all masked entries, in [0, 1]; 1 for an empty tree."""
    flat = tree.flatten(masks).values()
    total = sum(mask.size for mask in flat)
    kept = sum(
        int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else np.asarray(counts(mask)).sum(dtype=np.int64))
        for mask in flat
    )
    return kept / total if total else 1.0


def intersect(a: Masks, b: Masks) -> dict[str, jax.Array]:
    """Return the masks of the entries that both trees keep. A tree keeps all entries of a path that it lacks."""
    left, right = tree.flatten(a), tree.flatten(b)
    both = {path: jnp.logical_and(left[path], right[path]) for path in left if path in right}
    return tree.unflatten(left | right | both)
