"""The affine map with a low-rank and sparse update, for one kernel or several kernels with a common input.

Gradient rules put the values that they reuse behind an optimisation barrier. Without the barrier, XLA fuses ``erf``, ``exp``
and the statistics into every consumer and evaluates them again, which costs more on a CPU than a read from memory.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.typing import Array, Delta

barrier = jax.lax.optimization_barrier


class _Scales(NamedTuple):
    """The factors of A @ B and of S; hashable, so static."""

    low_rank: float
    sparse: float


def joint_dense(
    x: Array,
    kernels: tuple[Array, ...],
    biases: tuple[Array | None, ...],
    deltas: tuple[Delta, ...],
    supports: tuple[Array | None, ...],
    *,
    scale: float,
    scale_sparse: bool = True,
) -> tuple[jax.Array, ...]:
    """Return ``y_i = x @ (W_i + scale * A_i @ B_i + s * S_i) + bias_i`` for several kernels with a common input.

    The gradient of W_i is formed only if W_i itself is differentiated. The gradient of ``x`` is one matrix product, the
    gradients of A and B are thin products that start from common inputs, and the gradient of ``values`` is a gather.

    Args:
      x: (..., in), with one or more leading axes; its dtype is the dtype of the computation and of the result.
      kernels: each (in, out_i).
      biases: each (out_i,), or None.
      deltas: each with ``a`` (in, r_i) and ``b`` (r_i, out_i), and/or ``values`` (nnz_i,); empty for no update.
      supports: int32 (nnz_i, 2), row (input) and column (output) of each value; repeated coordinates add up. None for
        an update without values.
      scale: the factor of A @ B; alpha / rank.
      scale_sparse: s is ``scale``; with False it is 1.

    Returns:
      One (..., out_i) for each kernel, in the dtype of ``x``.
    """
    members = tuple(
        {"kernel": kernel, **delta} | ({} if bias is None else {"bias": bias}) | _support(delta, support)
        for kernel, bias, delta, support in zip(kernels, biases, deltas, supports, strict=True)
    )
    return _joint(_Scales(scale, scale if scale_sparse else 1.0), x, members)


def dense(
    x: Array,
    kernel: Array,
    bias: Array | None,
    delta: Delta,
    support: Array | None,
    *,
    scale: float,
    scale_sparse: bool = True,
) -> jax.Array:
    """Return ``x @ (W + scale * A @ B + s * S) + bias``: `joint_dense` of one kernel."""
    (y,) = joint_dense(x, (kernel,), (bias,), (delta,), (support,), scale=scale, scale_sparse=scale_sparse)
    return y


def _support(delta: Delta, support: Array | None) -> dict[str, Array]:
    if "values" not in delta:
        return {}
    if support is None:
        raise ValueError("an update with `values` needs the `supports` entry with their coordinates")
    return {"support": support}


def _folds(x: jax.Array, members: tuple[Mapping[str, Any], ...]) -> bool:
    """Return whether the update is added to the kernel (cheaper for many rows of x) rather than to the output.

    In 16 bits the update is never added to the kernel: an update below the last place of the kernel would vanish.
    """
    rows, width, outputs = x.size // x.shape[-1], x.shape[-1], sum(member["kernel"].shape[1] for member in members)
    return jnp.finfo(x.dtype).bits >= 32 and rows * (width + outputs) > width * outputs


def _effective(scales: _Scales, member: Mapping[str, Any], dtype: Any) -> jax.Array:
    w = member["kernel"].astype(dtype)
    if "a" in member:
        product = jnp.matmul(member["a"].astype(dtype), member["b"].astype(dtype), precision="highest")
        w = w + scales.low_rank * product
    if "values" in member:
        rows, columns = member["support"].T
        w = w.at[rows, columns].add(scales.sparse * member["values"].astype(dtype))
    return w


def _join(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def accumulator(dtype: Any) -> Any:
    """Return the dtype of sums of ``dtype``: float32, or float64 for float64."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return ``x @ w``, computed in the dtype of ``x``, accumulated and returned in float32 or wider."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=accumulator(x.dtype))


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the sum of ``x[..., :, None] * y[..., None, :]`` over the leading axes."""
    leading = tuple(range(x.ndim - 1))
    precise = accumulator(x.dtype)
    return jnp.tensordot(x, y.astype(x.dtype), (leading, leading), preferred_element_type=precise)


def _split(y: jax.Array, sizes: list[int]) -> list[jax.Array]:
    return jnp.split(y, np.cumsum(sizes)[:-1].tolist(), axis=-1)


def _low_rank_inputs(x: jax.Array, members: tuple[Mapping[str, Any], ...]) -> list[jax.Array]:
    """Return ``x @ A_i`` for the members with an A, from one product."""
    factors = [member["a"] for member in members if "a" in member]
    return _split(_matmul(x, _join(factors)), [a.shape[1] for a in factors]) if factors else []


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joint(scales: _Scales, x: jax.Array, members: tuple[dict[str, Any], ...]) -> tuple[jax.Array, ...]:
    if _folds(x, members):
        w = _join([_effective(scales, member, x.dtype) for member in members])
        outputs = _split(_matmul(x, w), [member["kernel"].shape[1] for member in members])
    else:
        outputs = [_matmul(x, member["kernel"]) for member in members]
        inputs = iter(_low_rank_inputs(x, members))
        for number, member in enumerate(members):
            if "a" in member:
                outputs[number] += scales.low_rank * _matmul(next(inputs).astype(x.dtype), member["b"])
            if "values" in member:
                rows, columns = member["support"].T
                moved = x[..., rows].astype(outputs[number].dtype) * wide(scales.sparse * member["values"], x)
                outputs[number] = outputs[number].at[..., columns].add(moved.astype(outputs[number].dtype))
    for number, member in enumerate(members):
        if "bias" in member:
            outputs[number] += wide(member["bias"], x).astype(outputs[number].dtype)
    return tuple(y.astype(x.dtype) for y in outputs)


def _joint_forward(scales: _Scales, x: Any, members: Any) -> Any:
    # The differentiated arguments must be static, since the backward pass computes only their gradients; the structure of
    # `wanted` encodes them, with None for every other argument.
    wanted = jax.tree.map(lambda primal: () if primal.perturbed else None, (x, members))
    x, members = jax.tree.map(lambda primal: primal.value, (x, members))
    return _joint(scales, x, members), (x, members, wanted)


def _joint_backward(scales: _Scales, residuals: Any, cotangents: Any) -> Any:
    x, members, (wants_x, wanted) = residuals
    zero = jax.custom_derivatives.SymbolicZero
    dy = [jnp.zeros(g.aval.shape, g.aval.dtype) if isinstance(g, zero) else g for g in cotangents]  # pyright: ignore[reportAttributeAccessIssue]
    # One barrier for all: the cotangents are read many times, and the folded kernels of the forward pass are not kept but
    # recomputed.
    dy, members = barrier((dy, members))
    low_rank = [(number, member) for number, member in enumerate(members) if "a" in member]
    inputs = [_matmul(dy[number], member["b"].T).astype(x.dtype) for number, member in low_rank]
    dx = _input_gradient(scales, x, members, dy, inputs) if wants_x is not None else None

    gradients = [dict.fromkeys(member) for member in members]

    def want(number: int, name: str) -> bool:
        return wanted[number].get(name) is not None

    for number, member in enumerate(members):
        if want(number, "kernel"):
            gradients[number]["kernel"] = _outer(x, dy[number])
        if want(number, "bias"):
            gradients[number]["bias"] = _sum_rows(dy[number])
        if want(number, "values"):
            rows, columns = member["support"].T
            # The barrier keeps XLA from fusing the operands into the gathers, which would compute them entry by entry.
            gathered = barrier((x[..., rows], dy[number][..., columns]))
            gradients[number]["values"] = scales.sparse * _sum_rows(gathered[0] * gathered[1])
    if any(want(number, "a") for number, _ in low_rank):
        joined = _split(_outer(x, _join(inputs)), [part.shape[-1] for part in inputs])
        for (number, _), part in zip(low_rank, joined, strict=True):
            gradients[number]["a"] = scales.low_rank * part
    if any(want(number, "b") for number, _ in low_rank):
        for (number, _), part in zip(low_rank, _low_rank_inputs(x, members), strict=True):
            gradients[number]["b"] = scales.low_rank * _outer(part.astype(x.dtype), dy[number])
    return dx, tuple(
        {name: None if value is None else value.astype(member[name].dtype) for name, value in gradient.items()}
        for gradient, member in zip(gradients, members, strict=True)
    )


def _input_gradient(
    scales: _Scales, x: jax.Array, members: tuple[Mapping[str, Any], ...], dy: list[jax.Array], inputs: list[jax.Array]
) -> jax.Array:
    if _folds(x, members):
        return _matmul(_join(dy), _join([_effective(scales, member, x.dtype) for member in members]).T).astype(x.dtype)
    dx = _matmul(_join(dy), _join([member["kernel"].astype(x.dtype) for member in members]).T)
    if inputs:
        dx += scales.low_rank * _matmul(_join(inputs), _join([member["a"] for member in members if "a" in member]).T)
    for g, member in zip(dy, members, strict=True):
        if "values" in member:
            rows, columns = member["support"].T
            moved = g[..., columns].astype(dx.dtype) * wide(scales.sparse * member["values"], x)
            dx = dx.at[..., rows].add(moved.astype(dx.dtype))
    return dx.astype(x.dtype)


_joint.defvjp(_joint_forward, _joint_backward, symbolic_zeros=True)  # pyright: ignore[reportFunctionMemberAccess]


def wide(vector: Array, x: Array) -> jax.Array:
    """Return ``vector`` with leading axes of length 1, so that it broadcasts against ``x``."""
    return jnp.asarray(vector).reshape((1,) * (x.ndim - 1) + (-1,))


def _sum_rows(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=accumulator(x.dtype))
