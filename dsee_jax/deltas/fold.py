"""Low-rank + sparse updates folded into frozen kernels (DSEE, arXiv 2111.00160, section 3).

    W_eff = W + scale * (A @ B + scatter(support, values))

The arrays of one kernel::

    params    query/kernel (768, 768)                                 frozen
    deltas    query/kernel/{a (768, 16), b (16, 768), values (64,)}   trained
    supports  query/kernel (64, 2)                                    int32, fixed

`materialize` gives plain params for any code. `dsee_jax.deltas.attach` runs a Linen model with its updates attached.
"""

import weakref
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsee_jax import orientation, tree
from dsee_jax.auto_axes import auto_sharded, spec
from dsee_jax.deltas.adapter import Adapter, Update, updates_of
from dsee_jax.errors import InputError
from dsee_jax.ops import dense
from dsee_jax.typing import Array, Delta

T = TypeVar("T")

_fitting: weakref.WeakValueDictionary[tuple[int, tuple[int, ...]], jax.Array] = weakref.WeakValueDictionary()
"""The supports whose coordinates were found to fit a matrix (in, out), by their id and its shape: each is copied to the host
once. A NumPy array can change."""


def effective(
    w: Array, delta: Delta, support: Array | None, *, scale: float | Array, scale_sparse: bool = True
) -> jax.Array:
    """Return ``w + scale * (a @ b + S)`` for a matrix (in, out) or a stack of matrices (stack..., in, out).

    The sum is float32 (float64 for a float64 kernel). The result has the dtype of ``w``. If ``scale_sparse`` is False, S is
    added unscaled.
    """

    def of_matrix(w: Array, delta: Delta, support: Array | None, scale: float | Array) -> jax.Array:
        total = jnp.asarray(w, dense.accumulator(w.dtype))
        if "a" in delta:
            total = total + scale * jnp.matmul(delta["a"], delta["b"], precision="highest")
        if "values" in delta:
            assert support is not None
            total = total.at[support[:, 0], support[:, 1]].add((scale if scale_sparse else 1.0) * delta["values"])
        return total.astype(w.dtype)

    of_stack = of_matrix
    for _ in range(w.ndim - 2):
        of_stack = jax.vmap(of_stack, (0, 0, 0, None))
    return auto_sharded(of_stack, w, delta, support, scale, out=spec(w))


def updates(
    w: Array, delta: Delta | None, support: Array | None, *, scale: float | Array, scale_sparse: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Return ``scale * a @ b`` and ``scale * (a @ b + S)``, dense, shaped like the matrix ``w``; zeros without a delta."""
    zeros = auto_sharded(lambda w: jnp.zeros(w.shape), w, out=spec(w))
    if delta is None:
        return zeros, zeros
    factors = {name: delta[name] for name in ("a", "b") if name in delta}
    update = effective(zeros, delta, support, scale=scale, scale_sparse=scale_sparse)
    return effective(zeros, factors, None, scale=scale), update


def folded(w: Array, path: str, update: Update, *, scale: float | Array, scale_sparse: bool) -> jax.Array:
    """Return the kernel at ``path``, of any orientation, with its update folded in.

    Raises:
      InputError: the update does not fit the kernel.
    """
    check(path, w.shape, update)
    delta, support, axes = update
    matrix = orientation.matrix(w, axes)
    return orientation.tensor(effective(matrix, delta, support, scale=scale, scale_sparse=scale_sparse), w, axes)


def check(path: str, shape: tuple[int, ...], update: Update) -> None:
    """Raise `InputError` unless the arrays of an update fit the kernel of this ``shape`` at ``path``."""
    matrix = orientation.matrix_shape(shape, orientation.find(path, shape, update.orientation))
    dense.check(repr(path), matrix, update.delta, update.support)
    support = update.support
    if support is None or not _is_known(support) or _fitting.get((id(support), matrix[-2:])) is support:
        return
    coordinates = np.asarray(support)
    if not ((coordinates >= 0) & (coordinates < matrix[-2:])).all():
        largest = tuple(coordinates.reshape(-1, 2).max(0).tolist())
        raise InputError(
            f"the update of {path!r} has coordinates up to {largest}; its kernel is {matrix[-2:]}: pass deltas and supports "
            "that were created for these params"
        )
    if isinstance(support, jax.Array):
        _fitting[id(support), matrix[-2:]] = support


def _is_known(array: Array) -> bool:
    """Return whether the numbers of an array are known here: they may be traced, or on other hosts."""
    return isinstance(array, np.ndarray) or (
        isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_fully_addressable
    )


def materialize(params: T, adapter: Adapter | None) -> T:
    """Return plain params with every update folded into its kernel; equal to attached updates up to rounding.

    Args:
      params: a pytree of weights of any framework. Its structure, containers and boxes are kept.
      adapter: updates at some paths of ``params``; None for none.

    Raises:
      InputError: a path of the adapter is not in ``params``, or an update does not fit its kernel.
    """
    updates = updates_of(adapter)
    if adapter is None:
        return params
    flat = tree.flatten(params)
    options = {"scale": adapter.scale, "scale_sparse": adapter.scale_sparse}
    sums = {path: folded(tree.lookup(flat, path), path, update, **options) for path, update in updates.items()}
    return tree.replace(params, sums)
