"""Masks of kernels: bool trees at the pruned paths only. True = kept.

A pruned weight is exactly 0.0: masks select and never multiply, so no -0.0 and no NaN remains.
"""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dsee_jax import counts, tree
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
        if not hasattr(mask, "shape"):
            raise InputError(f"the mask of {path!r} is {mask!r}; expected a bool array of the shape {w.shape}")
        if w.shape != mask.shape:
            raise InputError(f"the mask of {path!r} has the shape {mask.shape}, its kernel {w.shape}")
        return _zeroed(w, mask)

    return tree.replace(params, {path: pruned(path, mask) for path, mask in tree.flatten(masks).items()})


def _zeroed(w: Array, mask: Array) -> Array:
    # NumPy arrays stay on the host; a device may be too small for them.
    numpy = np if isinstance(w, np.ndarray) and isinstance(mask, np.ndarray) else jnp
    return numpy.where(mask, w, numpy.zeros((), w.dtype))


def keep(masks: Masks) -> optax.GradientTransformation:
    """Return the optax transformation that sets the updates of pruned entries to 0; pass it last to ``optax.chain``.

    A model that `apply` has pruned stays pruned, whatever momentum and weight decay the transformations before add::

        optimizer = optax.chain(optax.adamw(1e-3), dsee_jax.masks.keep(masks))

    Updates without a mask, and masks without an update, are passed over: the params may be any pytree, frozen in part
    (``optax.masked``, ``optax.multi_transform``).

    The state is empty. Masks that change are an argument of the compiled step, which makes the optimizer from them; the state
    of the optimizer fits all masks, and nothing is compiled again::

        @jax.jit
        def step(params, state, masks, batch):
            masks = prune.unstructured(params, ..., sparsity=schedule(state[0].count), keep=masks)
            params = dsee_jax.masks.apply(params, masks)
            updates, state = optax.chain(optax.adamw(1e-3), dsee_jax.masks.keep(masks)).update(..., state, params)

    Raises:
      InputError: in ``init`` and ``update``: a mask has another shape than the update at its path, or no mask has an update.
    """
    flat = tree.flatten(masks)

    def masked(updates: Any) -> dict[str, Array]:
        """Return the updates that have a mask, by path."""
        leaves = tree.flatten(updates, _is_absent)
        if flat and not flat.keys() & leaves.keys():
            raise InputError(
                f"no mask has an update: the masks begin with {min(flat)!r}, the updates with {min(leaves, default='')!r}; "
                "pass masks of the tree that the optimizer updates"
            )
        present = {path: leaves[path] for path in flat if not _is_absent(leaves.get(path))}
        for path, leaf in present.items():
            if leaf.shape != flat[path].shape:
                raise InputError(f"the mask of {path!r} has the shape {flat[path].shape}, its update {leaf.shape}")
        return present

    def init(params: optax.Params) -> optax.EmptyState:
        masked(params)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        kept = {path: _zeroed(leaf, flat[path]) for path, leaf in masked(updates).items()}
        return tree.replace(updates, kept), state

    return optax.GradientTransformation(init, update)


def _is_absent(leaf: Any) -> bool:
    """Return whether a leaf stands for params that are not trained."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def density(masks: Masks) -> float | jax.Array:
    """Return the kept fraction of all masked entries, in [0, 1]; 1 for an empty tree.

    The count is exact for any number of entries. Under ``jax.jit`` the fraction is a float32 of shape ().
    """
    flat = list(tree.flatten(masks).values())
    total = sum(mask.size for mask in flat)
    if not total:
        return 1.0
    parts = [
        counts.of(int(np.count_nonzero(mask))) if isinstance(mask, np.ndarray) else counts.true(mask) for mask in flat
    ]
    kept = functools.reduce(counts.add, parts)
    if isinstance(kept.high, Tracer):
        return (kept.high.astype(jnp.float32) * 256 + kept.low.astype(jnp.float32)) / total
    return counts.number(kept) / total


def intersect(a: Masks, b: Masks) -> dict[str, jax.Array]:
    """Return the masks of the entries that both trees keep. A tree keeps all entries of a path that it lacks."""
    left, right = tree.flatten(a), tree.flatten(b)
    for path in left.keys() & right.keys():
        if left[path].shape != right[path].shape:
            raise InputError(
                f"the masks of {path!r} have the shapes {left[path].shape} and {right[path].shape}: pass masks of one model"
            )
    both = {path: jnp.logical_and(left[path], right[path]) for path in left if path in right}
    return tree.unflatten(left | right | both)
