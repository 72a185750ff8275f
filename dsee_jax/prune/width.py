"""Coefficients of the hidden dimensions of a model: at 0 and 1 they compute the model without the dimensions at 0.

`dsee_jax.prune.sensitivity` differentiates them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax.deltas.attach import input_of, intercepted
from dsee_jax.errors import InputError
from dsee_jax.models.layers import LayerNorm, RmsNorm
from dsee_jax.ops.dense import wide
from dsee_jax.ops.joint import Affine, JointDense
from dsee_jax.prune.earlybert import traced_anew
from dsee_jax.typing import Array


@contextlib.contextmanager
def weighted(coefficients: Array, axes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Multiply the hidden dimensions by coefficients wherever a Linen model of this library reads them.

    Dimensions are read by kernels, by the table of words that makes logits, and by the statistics of norms. In a norm a
    coefficient is the weight of its dimension in the means: coefficients of 0 and 1 compute the model without the dimensions
    at 0, as `dsee_jax.prune.masked` does. The residual stream itself is not multiplied, so that each use counts once.

    Args:
      coefficients: (width,); or (rows, width), one for each row of the batch, whose gradients are those of the rows apart. An
        input without rows, such as embeddings of distances, is then not multiplied.
      axes: ``dsee_jax.models.hidden_axes(model)``.

    Raises:
      InputError: a kernel that reads hidden dimensions was not called in the block.
    """
    readers = {path for path, own in axes.items() if path.endswith("/kernel") and 0 in own}
    c, seen = jnp.asarray(coefficients), set[str]()

    def of(x: jax.Array) -> jax.Array | None:
        """Return the coefficients in a shape that multiplies ``x`` (..., width); None for an input without rows."""
        *rows, width = c.shape
        if rows and x.shape[0] != rows[0]:
            return None
        return c.reshape(*rows, *[1] * (x.ndim - 1 - len(rows)), width)

    def times(x: jax.Array) -> jax.Array:
        own = of(x)
        return x if own is None else (x * own).astype(x.dtype)

    def intercept(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if module.scope is None:
            return call(*args, **kwargs)
        if context.method_name == "attend":
            return call(times(args[0]), *args[1:], **kwargs)
        if context.method_name != "__call__" or isinstance(module, Affine):  # of a JointDense, which has the input
            return call(*args, **kwargs)
        if isinstance(module, LayerNorm | RmsNorm) and f"{path}/scale" in axes:
            return _normalised(module, args[0], of(args[0]), call)
        names = module.joint if isinstance(module, JointDense) else ("",)
        kernels = {"/".join(filter(None, (path, name, "kernel"))) for name in names} & readers
        if not kernels:
            return call(*args, **kwargs)
        seen.update(kernels)
        return call(times(input_of(args, kwargs)), *args[1:])

    with traced_anew(), intercepted(intercept):
        yield
    for path in sorted(readers - seen):
        raise InputError(
            f"the coefficients of hidden dimensions reached no {path!r}: call the whole model in the block"
        )


def _normalised(
    module: LayerNorm | RmsNorm, x: jax.Array, weights: jax.Array | None, call: Callable[..., Any]
) -> jax.Array:
    """Return the norm of ``x`` (..., width) whose means are over dimensions with these weights."""
    if weights is None:
        return call(x)
    share, y = weights / jnp.sum(weights, axis=-1, keepdims=True), x.astype(jnp.float32)
    if isinstance(module, LayerNorm):
        y = y - jnp.sum(share * y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.sum(share * jnp.square(y), axis=-1, keepdims=True) + module.epsilon)
    y = y * wide(module.get_variable("params", "scale"), y)
    if isinstance(module, LayerNorm):
        y = y + wide(module.get_variable("params", "bias"), y)
    return y.astype(module.dtype)
