"""The affine map with a low-rank and sparse update, for one kernel or several kernels with a common input.

All functions are differentiable in every mode. Each tangent is written with the products that make its transpose cheap: JAX's
transposition of them gives a gradient of A and B by thin products, of ``values`` by a gather, and of ``x`` by one product
with the joined kernels.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.auto_axes import auto_sharded, spec
from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Delta


class _Scales(NamedTuple):
    """The factors of A @ B and of S."""

    low_rank: float | jax.Array
    sparse: float | jax.Array


def joint_dense(
    x: Array,
    kernels: tuple[Array, ...],
    biases: tuple[Array | None, ...],
    deltas: tuple[Delta, ...],
    supports: tuple[Array | None, ...],
    *,
    scale: float | Array,
    scale_sparse: bool = True,
) -> tuple[jax.Array, ...]:
    """Return ``y_i = x @ (W_i + scale * A_i @ B_i + s * S_i) + bias_i`` for several kernels with a common input.

    The gradient of W_i is formed only if W_i itself is differentiated. The gradient of ``x`` is one matrix product, the
    gradients of A and B are thin products that start from common inputs, and the gradient of ``values`` is a gather. The
    backward pass keeps ``x`` and the arguments and recomputes everything else.

    Without an update, the result has the bits of ``flax.linen.Dense`` and of `joint_products` plus the bias: the sum of
    the products is rounded to the dtype of ``x`` before the bias is added.

    Args:
      x: (..., in), with one or more leading axes; its dtype is the dtype of the computation and of the result.
      kernels: each (in, out_i).
      biases: each (out_i,), or None.
      deltas: each with ``a`` (in, r_i) and ``b`` (r_i, out_i), and/or ``values`` (nnz_i,); empty for no update.
      supports: int32 (nnz_i, 2), row (input) and column (output) of each value; repeated coordinates add up. None for
        an update without values.
      scale: the factor of A @ B; alpha / rank. It may be traced and differentiated.
      scale_sparse: s is ``scale``; with False it is 1.

    Returns:
      One (..., out_i) for each kernel, in the dtype of ``x``.

    Raises:
      InputError: an array of an update does not fit its kernel.
    """
    members = tuple(
        {"kernel": kernel} | _member(kernel.shape, delta, support) | ({} if bias is None else {"bias": bias})
        for kernel, bias, delta, support in zip(kernels, biases, deltas, supports, strict=True)
    )
    out = [(*spec(x)[:-1], spec(kernel)[-1]) for kernel in kernels]
    return auto_sharded(_joint, x, members, _scales(x, scale, scale_sparse), out=out)


def dense(
    x: Array,
    kernel: Array,
    bias: Array | None,
    delta: Delta,
    support: Array | None,
    *,
    scale: float | Array,
    scale_sparse: bool = True,
) -> jax.Array:
    """Return ``x @ (W + scale * A @ B + s * S) + bias``: `joint_dense` of one kernel."""
    (y,) = joint_dense(x, (kernel,), (bias,), (delta,), (support,), scale=scale, scale_sparse=scale_sparse)
    return y


def update(
    x: Array, delta: Delta, support: Array | None, *, features: int, scale: float | Array, scale_sparse: bool = True
) -> jax.Array:
    """Return ``x @ (scale * A @ B + s * S)``, the output of an update alone, forward and backward without a kernel.

    Args:
      x: (..., in), with one or more leading axes; its dtype is the dtype of the computation.
      delta: ``a`` (in, r) and ``b`` (r, features), and/or ``values`` (nnz,); empty for zeros.
      support: int32 (nnz, 2), or None for an update without values.
      features: the width of the output.
      scale, scale_sparse: as for `joint_dense`.

    Returns:
      (..., features) in the `accumulator` dtype of ``x``, so that a sum with the output of a kernel is rounded only once.

    Raises:
      InputError: an array of the update does not fit (in, features).
    """
    member = _member((x.shape[-1], features), delta, support)

    def of_rows(x: jax.Array, member: Mapping[str, Any], scales: _Scales) -> jax.Array:
        zeros = jnp.zeros((*x.shape[:-1], features), accumulator(x.dtype))
        # The gathered entries of x can be larger than x: the backward pass gathers them again.
        (y,) = jax.checkpoint(_add_updates)([zeros], x, (member,), scales)
        return y

    return auto_sharded(of_rows, x, member, _scales(x, scale, scale_sparse), out=(*spec(x)[:-1], ()))


def joint_products(x: jax.Array, kernels: Sequence[Array]) -> list[jax.Array]:
    """Return ``x @ W_i`` for each kernel (in, out_i), in the dtype of ``x``.

    Many rows of ``x`` are multiplied by all kernels at once. For few rows, the copy that joins the kernels would cost more
    than the products.
    """
    kernels = [w.astype(x.dtype) for w in kernels]
    if len(kernels) > 1 and _many_rows(x, kernels):
        return _split(jnp.matmul(x, _join(kernels)), kernels)
    return [jnp.matmul(x, w) for w in kernels]


def check(name: str, shape: Sequence[int], delta: Delta, support: Array | None) -> None:
    """Check that the arrays of one update fit their kernel.

    Args:
      name: the path or a description of the kernel, for the error.
      shape: (stack..., in, out), the shape of the kernel.
      delta: ``a`` (stack..., in, r) and ``b`` (stack..., r, out), and/or ``values`` (stack..., nnz).
      support: (stack..., nnz, 2), or None for an update without values.

    Raises:
      InputError: an array is missing, unknown or misshapen.
    """
    *stack, width, outputs = shape
    where = f"the update of {name}"
    for part, other in (("a", "b"), ("b", "a")):
        if part in delta and other not in delta:
            raise InputError(
                f"{where} has {part!r} and no {other!r}: pass both factors of the low-rank part, or neither"
            )
    if "values" in delta and support is None:
        raise InputError(
            f"{where} has 'values' and no coordinates: pass the supports that were created with the deltas"
        )
    rank = delta["a"].shape[-1:] if "a" in delta else ()
    entries = delta["values"].shape[-1:] if "values" in delta else ()
    expected = {"a": (*stack, width, *rank), "b": (*stack, *rank, outputs), "values": (*stack, *entries)}
    arrays: dict[str, Any] = dict(delta)
    if "values" in delta:
        expected["support"], arrays["support"] = (*stack, *entries, 2), support
    if support is not None and not jnp.issubdtype(support.dtype, jnp.integer):
        raise InputError(f"{where} has 'support' of dtype {support.dtype}; expected whole numbers: int32")
    for part, array in arrays.items():
        if part not in expected:
            raise InputError(f"{where} has an unknown array {part!r}; expected 'a' and 'b', and/or 'values'")
        if tuple(array.shape) != expected[part]:
            raise InputError(
                f"{where} has {part!r} of shape {tuple(array.shape)}; the kernel of shape {tuple(shape)} needs "
                f"{expected[part]}: pass deltas and supports that were created for these params"
            )


def _member(shape: Sequence[int], delta: Delta, support: Array | None) -> dict[str, Any]:
    check("a kernel", shape, delta, support)
    return {**delta, "support": support} if "values" in delta else dict(delta)


def _scales(x: Array, scale: float | Array, scale_sparse: bool) -> _Scales:
    # A number stays a number, so that the compiler sees the same constant in the forward and in the backward pass.
    low_rank = scale if isinstance(scale, (int, float)) else jnp.asarray(scale, accumulator(x.dtype))
    return _Scales(low_rank, low_rank if scale_sparse else 1.0)


def _many_rows(x: Array, kernels: Sequence[Array]) -> bool:
    """Return whether the product reads and writes more entries of x and y than of the kernels.

    A program that is exported for any number of rows is made for many.
    """
    rows, width, outputs = math.prod(x.shape[:-1]), x.shape[-1], sum(w.shape[1] for w in kernels)
    return not isinstance(rows, int) or rows * (width + outputs) > width * outputs


def _folds(x: Array, members: tuple[Mapping[str, Any], ...]) -> bool:
    """Return whether the update is added to the kernel (cheaper for many rows of x) rather than to the output.

    In 16 bits the update is never added to the kernel: an update below the last place of the kernel would vanish.
    """
    return jnp.finfo(x.dtype).bits >= 32 and _many_rows(x, [member["kernel"] for member in members])


def _effective(member: Mapping[str, Any], scales: _Scales, dtype: Any) -> jax.Array:
    w = member["kernel"].astype(dtype)
    if "a" in member:
        product = jnp.matmul(member["a"].astype(dtype), member["b"].astype(dtype), precision="highest")
        w = w + scales.low_rank * product
    if "values" in member:
        rows, columns = member["support"].T
        w = w.at[rows, columns].add(scales.sparse * jnp.asarray(member["values"], dtype))
    return w


def _join(parts: Sequence[Array]) -> jax.Array:
    return jnp.asarray(parts[0]) if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _split(y: jax.Array, like: Sequence[Array]) -> list[jax.Array]:
    """Split the last axis as the last axes of ``like``."""
    return jnp.split(y, np.cumsum([part.shape[-1] for part in like])[:-1].tolist(), axis=-1)


def accumulator(dtype: Any) -> Any:
    """Return the dtype of sums of ``dtype``: float32, or float64 for float64."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


@jax.custom_jvp
def _thin(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return ``x @ w``, computed in the dtype of ``x``, accumulated and returned in float32 or wider.

    In 16 bits, the gradient of ``x`` is a product in 16 bits, and the gradient of a float32 ``w`` is accumulated in float32.
    """
    return _rows_product(x, w.astype(x.dtype), preferred_element_type=accumulator(x.dtype))


@functools.partial(_thin.defjvp, symbolic_zeros=True)  # pyright: ignore[reportFunctionMemberAccess]
def _thin_jvp(primals: Any, tangents: Any) -> Any:
    (x, w), (x_t, w_t) = primals, _perturbed(tangents)
    y = _thin(x, w)
    from_x = 0 if x_t is None else _rows_product(x_t, w.astype(x.dtype)).astype(y.dtype)
    from_w = 0 if w_t is None else _wider_product(x, w_t).astype(y.dtype)
    return y, from_x + from_w


def _wider_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return ``x @ w`` in the wider of their two dtypes, also where JAX promotes no dtype (jax_numpy_dtype_promotion)."""
    wider = max(x.dtype, w.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return _rows_product(x.astype(wider), w.astype(wider))


def _rows_product(x: jax.Array, w: jax.Array, **options: Any) -> jax.Array:
    """Return ``x @ w`` for ``x`` (..., in) and ``w`` (in, out)."""
    if jax.device_count() > 1:
        # The batch and the length of x may be split over different axes of a mesh: joined, they would be gathered.
        return jnp.matmul(x, w, **options)
    # The gradient of w sums over the rows. With one axis of rows, XLA multiplies without a transposed copy of the cotangent.
    return jnp.matmul(x.reshape(-1, x.shape[-1]), w, **options).reshape(*x.shape[:-1], w.shape[1])


def _perturbed(tangents: Any) -> Any:
    """Return the tangents with None for those that are zero because their argument is not differentiated."""
    zero = jax.custom_derivatives.SymbolicZero
    return jax.tree.map(lambda t: None if isinstance(t, zero) else t, tangents)  # pyright: ignore[reportAttributeAccessIssue]


def _jvp(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Return the tangent of ``function`` for tangents of some of the leaves of its arguments, None for the others."""
    leaves, structure = jax.tree.flatten(primals)
    leaves_t = structure.flatten_up_to(tangents)
    wanted = [number for number, t in enumerate(leaves_t) if t is not None]

    def of_wanted(*values: jax.Array) -> Any:
        merged = list(leaves)
        for number, value in zip(wanted, values, strict=True):
            merged[number] = value
        return function(*structure.unflatten(merged))

    return jax.jvp(of_wanted, [leaves[number] for number in wanted], [leaves_t[number] for number in wanted])[1]


def _add_updates(
    outputs: Sequence[jax.Array], x: jax.Array, members: Sequence[Mapping[str, Any]], scales: _Scales
) -> list[jax.Array]:
    """Return each output plus ``x @ (scale * A @ B + s * S)``, in the `accumulator` dtype."""
    sums = [y.astype(accumulator(x.dtype)) for y in outputs]
    factors = [member["a"] for member in members if "a" in member]
    inputs = iter(_split(scales.low_rank * _thin(x, _join(factors)), factors) if factors else ())
    entries = [member["values"] for member in members if "values" in member]
    rows = [member["support"][:, 0] for member in members if "values" in member]
    gathered = iter(_split(x[..., _join(rows)], entries) if entries else ())
    for number, member in enumerate(members):
        if "a" in member:
            sums[number] += _thin(next(inputs).astype(x.dtype), member["b"])
        if "values" in member:
            values = scales.sparse * jnp.asarray(member["values"], sums[number].dtype)
            sums[number] = (
                sums[number].at[..., member["support"][:, 1]].add(next(gathered).astype(values.dtype) * wide(values, x))
            )
    return sums


@jax.custom_jvp
def _joint(x: jax.Array, members: tuple[dict[str, Any], ...], scales: _Scales) -> tuple[jax.Array, ...]:
    if _folds(x, members):
        outputs = joint_products(x, [_effective(member, scales, x.dtype) for member in members])
    else:
        outputs = _add_updates(joint_products(x, [member["kernel"] for member in members]), x, members, scales)
    # The bias is added after the sum is rounded, as nn.Dense does.
    outputs = [y.astype(x.dtype) for y in outputs]
    return tuple(
        y + wide(member["bias"], x).astype(x.dtype) if "bias" in member else y
        for y, member in zip(outputs, members, strict=True)
    )


@functools.partial(_joint.defjvp, symbolic_zeros=True)  # pyright: ignore[reportFunctionMemberAccess]
def _joint_jvp(primals: Any, tangents: Any) -> Any:
    x, members, scales = primals
    # The only residuals are the arguments: the checkpoint computes the folded kernels and the thin products again.
    tangent = jax.checkpoint(functools.partial(_joint_tangent, scales=scales))
    return _joint(x, members, scales), tangent(_perturbed(tangents), x, members)


def _joint_tangent(tangents: Any, x: jax.Array, members: Any, scales: _Scales) -> tuple[jax.Array, ...]:
    x_t, members_t, scales_t = tangents
    folds = _folds(x, members)
    zeros = [jnp.zeros((*x.shape[:-1], member["kernel"].shape[1]), accumulator(x.dtype)) for member in members]
    others = ("kernel", "bias")
    updates_t = [{name: t for name, t in member_t.items() if name not in others} for member_t in members_t]
    updates = [{name: member[name] for name in update_t} for member, update_t in zip(members, updates_t, strict=True)]
    outputs_t = _jvp(
        functools.partial(_add_updates, zeros), (x, updates, scales), (None if folds else x_t, updates_t, scales_t)
    )
    if x_t is not None:
        kernels = [_effective(member, scales, x.dtype) if folds else member["kernel"] for member in members]
        products_t = joint_products(x_t, kernels)
        outputs_t = [sum_t + t.astype(sum_t.dtype) for sum_t, t in zip(outputs_t, products_t, strict=True)]
    for number, member_t in enumerate(members_t):
        if member_t["kernel"] is not None:
            outputs_t[number] += _wider_product(x, member_t["kernel"]).astype(zeros[number].dtype)
        if member_t.get("bias") is not None:
            outputs_t[number] += wide(member_t["bias"], x).astype(zeros[number].dtype)
    return tuple(t.astype(x.dtype) for t in outputs_t)


def wide(vector: Array, x: Array) -> jax.Array:
    """Return ``vector`` with leading axes of length 1, so that it broadcasts against ``x``."""
    return jnp.asarray(vector).reshape((1,) * (x.ndim - 1) + (-1,))
