"""Low-rank + sparse updates folded into frozen kernels (DSEE, arXiv 2111.00160, section 3).

    W_eff = W + scale * (A @ B + scatter(support, values))

The arrays of one kernel::

    params    query/kernel (768, 768)                                 frozen
    deltas    query/kernel/{a (768, 16), b (16, 768), values (64,)}   trained
    supports  query/kernel (64, 2)                                    int32, fixed

`materialize` gives plain params for code that is not Linen. `dsee_jax.deltas.apply` runs a Linen model with its updates
attached: they are the collections ``delta`` and ``support``, which an interceptor reads at each ``nn.Dense`` and at each joint
projection (a module whose attribute ``joint`` names the children that hold the kernels).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.ops.dense import accumulator
from dsee_jax.typing import Array, Delta, Deltas, Params, Supports

SCALE = 2.0
"""alpha / rank of the authors' settings (32 / 16) and of a default `DeltaConfig`. Pass ``config.scale`` for other settings."""

_PARTS = frozenset({"a", "b", "values"})


def _is_delta(node: Any) -> bool:
    return (
        isinstance(node, Mapping) and bool(node) and _PARTS.issuperset(node) and not isinstance(_first(node), Mapping)
    )


def _first(node: Mapping[str, Any]) -> Any:
    return next(iter(node.values()))


def kernels(deltas: Deltas | None) -> dict[str, Delta]:
    """Return ``{kernel path: delta}``; paths are sorted at every level."""
    return tree.flatten(deltas, is_leaf=_is_delta) if deltas else {}


def count(deltas: Deltas | None) -> int:
    """Return the number of trained parameters of the updates; coordinates are not trained and do not count."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(deltas))


def effective(w: Array, delta: Delta, support: Array | None, *, scale: float, scale_sparse: bool = True) -> jax.Array:
    """Return ``w + scale * (a @ b + S)`` for a kernel (in, out) or a stack of kernels (layers, in, out).

    The sum is float32 (float64 for a float64 kernel). The result has the dtype of ``w``. If ``scale_sparse`` is False, S is
    added unscaled.

    Raises:
      InputError: the delta has values and there is no support.
    """
    if w.ndim > 2:
        return jax.vmap(lambda w, d, s: effective(w, d, s, scale=scale, scale_sparse=scale_sparse))(w, delta, support)
    total = jnp.asarray(w, accumulator(w.dtype))
    if "a" in delta:
        total = total + scale * jnp.matmul(delta["a"], delta["b"], precision="highest")
    if "values" in delta:
        if support is None:
            raise InputError("a delta has values and no support: pass the supports that were created with the delta")
        total = total.at[support[:, 0], support[:, 1]].add((scale if scale_sparse else 1.0) * delta["values"])
    return total.astype(w.dtype)


def updates(
    w: Array, delta: Delta | None, support: Array | None, *, scale: float, scale_sparse: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return ``scale * a @ b`` and ``scale * (a @ b + S)``, dense, shaped like the kernel ``w``; zeros without a delta."""
    zeros = jnp.zeros(w.shape)
    if delta is None:
        return zeros, zeros
    factors = {name: delta[name] for name in ("a", "b") if name in delta}
    update = effective(zeros, delta, support, scale=scale, scale_sparse=scale_sparse)
    return effective(zeros, factors, None, scale=scale), update


def materialize(
    params: Params, deltas: Deltas | None, supports: Supports | None, *, scale: float = SCALE, scale_sparse: bool = True
) -> dict[str, Any]:
    """Return plain params with every update folded into its kernel; equal to attached updates up to rounding.

    Args:
      params: the tree of kernels, from any framework whose params are nested dicts.
      deltas: updates at some paths of ``params``, or None.
      supports: the coordinates of the sparse updates, or None for no sparse updates.
      scale: alpha / rank.
      scale_sparse: whether S is scaled too.

    Raises:
      InputError: a path of ``deltas`` is not in ``params``.
    """
    flat, coordinates = tree.flatten(params), tree.flatten(supports or {})
    for path, delta in kernels(deltas).items():
        w = tree.get(params, path)
        flat[path] = effective(w, delta, coordinates.get(path), scale=scale, scale_sparse=scale_sparse)
    return tree.unflatten(flat)
