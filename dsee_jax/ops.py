"""Operations on single arrays with gradient rules of their own: the updated affine map, norms, activations, dropout.

Where a rule needs a value again, the value stands behind an optimisation barrier. Without it XLA's fusion evaluates
``erf``, ``exp`` and the statistics once more in every consumer, which costs more on a CPU than reading them back.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.aliases import Array, Delta, Key

_barrier = jax.lax.optimization_barrier


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
    """Return ``y_i = x @ (W_i + scale * A_i @ B_i + s * S_i) + bias_i`` for several kernels that read the same input.

    The gradient of W_i is formed only where W_i itself is differentiated. That of ``x`` is one matrix product, those of A
    and B are thin ones that start from inputs common to all members, that of ``values`` is a gather.

    Args:
      x: (..., in), with one leading axis or more; its dtype is the one computed in and returned.
      kernels: each (in, out_i).
      biases: each (out_i,), or None for none.
      deltas: each with ``a`` (in, r_i) and ``b`` (r_i, out_i), and/or ``values`` (nnz_i,); empty for no update.
      supports: int32 (nnz_i, 2), row (input) and column (output) of each value; repeated coordinates add up. None where
        there are no values.
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
        raise ValueError("an update with `values` needs the `supports` entry that says where they stand")
    return {"support": support}


def _folds(x: jax.Array, members: tuple[Mapping[str, Any], ...]) -> bool:
    """Whether the update is added to the kernel (cheaper for many rows of x) rather than to the output.

    Never in 16 bits: there an update smaller than the kernel's last place would vanish.
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


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x @ w`` in the dtype of ``x``, accumulated and returned in float32 or better."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum of ``x[..., :, None] * y[..., None, :]`` over the leading axes."""
    leading = tuple(range(x.ndim - 1))
    precise = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.tensordot(x, y.astype(x.dtype), (leading, leading), preferred_element_type=precise)


def _split(y: jax.Array, sizes: list[int]) -> list[jax.Array]:
    return jnp.split(y, np.cumsum(sizes)[:-1].tolist(), axis=-1)


def _low_rank_inputs(x: jax.Array, members: tuple[Mapping[str, Any], ...]) -> list[jax.Array]:
    """Return ``x @ A_i`` of the members that have one, from one product."""
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
                moved = x[..., rows].astype(outputs[number].dtype) * _wide(scales.sparse * member["values"], x)
                outputs[number] = outputs[number].at[..., columns].add(moved.astype(outputs[number].dtype))
    for number, member in enumerate(members):
        if "bias" in member:
            outputs[number] += _wide(member["bias"], x)
    return tuple(y.astype(x.dtype) for y in outputs)


def _joint_forward(scales: _Scales, x: Any, members: Any) -> Any:
    # What is differentiated decides what the backward computes, so it must stay static: empty nodes say it by structure.
    wanted = jax.tree.map(lambda primal: () if primal.perturbed else None, (x, members))
    x, members = jax.tree.map(lambda primal: primal.value, (x, members))
    return _joint(scales, x, members), (x, members, wanted)


def _joint_backward(scales: _Scales, residuals: Any, cotangents: Any) -> Any:
    x, members, (wants_x, wanted) = residuals
    zero = jax.custom_derivatives.SymbolicZero
    dy = [jnp.zeros(g.aval.shape, g.aval.dtype) if isinstance(g, zero) else g for g in cotangents]  # pyright: ignore[reportAttributeAccessIssue]
    # Behind one barrier: the cotangents are read many times, and kernels folded anew here need not be kept from before.
    dy, members = _barrier((dy, members))
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
            # Barriers: a gather whose operand is fused into it computes that operand entry by entry.
            gathered = _barrier((x[..., rows], dy[number][..., columns]))
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
            moved = g[..., columns].astype(dx.dtype) * _wide(scales.sparse * member["values"], x)
            dx = dx.at[..., rows].add(moved.astype(dx.dtype))
    return dx.astype(x.dtype)


_joint.defvjp(_joint_forward, _joint_backward, symbolic_zeros=True)  # pyright: ignore[reportFunctionMemberAccess]


def _wide(vector: Array, x: Array) -> jax.Array:
    """``vector`` with leading axes of length 1, as many as it takes to stand beside ``x``."""
    return jnp.asarray(vector).reshape((1,) * (x.ndim - 1) + (-1,))


def _sum_rows(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return ``x * Phi(x)``, Phi the normal distribution function by ``erf`` (arXiv 1606.08415)."""
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@gelu.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _gelu_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    cdf = _barrier(_normal_cdf(x))
    density = jnp.exp(-0.5 * jnp.square(x)) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return x * cdf, t * (cdf + x * density)


@jax.custom_jvp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """Return the tanh approximation of `gelu` (arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1.0 + _gelu_tanh(x))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(np.sqrt(2.0 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3))


@gelu_tanh.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _gelu_tanh_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    tanh = _barrier(_gelu_tanh(x))
    inner = np.sqrt(2.0 / np.pi).astype(x.dtype) * (1.0 + 3 * 0.044715 * jnp.square(x))
    return 0.5 * x * (1.0 + tanh), t * 0.5 * (1.0 + tanh + x * (1.0 - jnp.square(tanh)) * inner)


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
    """Return ``x * sigmoid(x)`` (arXiv 1702.03118)."""
    return x * jax.nn.sigmoid(x)


@silu.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _silu_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    gate = _barrier(jax.nn.sigmoid(x))
    return x * gate, t * gate * (1.0 + x * (1.0 - gate))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, epsilon: float) -> jax.Array:
    """Return ``x`` (..., width) divided by the root of its mean square over the last axis, then scaled (arXiv 1910.07467).

    ``scale`` has shape (width,). Statistics and result are float32 (float64 for float64 input).
    """
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    return x * _inverse_root(x, epsilon) * _wide(scale, x)


def _inverse_root(x: jax.Array, epsilon: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


@rms_norm.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _rms_norm_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    (x, scale), (t, scale_t) = primals, tangents
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    inverse = _barrier(_inverse_root(x, epsilon))
    normal, t = x * inverse, t.astype(x.dtype)
    y = normal * _wide(scale, x)
    t = inverse * (t - normal * jnp.mean(t * normal, axis=-1, keepdims=True))
    return y, (t * _wide(scale, x) + normal * _wide(scale_t, x)).astype(y.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> jax.Array:
    """Return ``x`` (..., width) normalised over its last axis, then scaled and shifted (arXiv 1607.06450).

    ``scale`` and ``bias`` have shape (width,). Statistics and result are float32 (float64 for float64 input).
    """
    normal, _ = _normalise(x, epsilon)
    return normal * _wide(scale, x) + _wide(bias, x)


def _normalise(x: Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


@layer_norm.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _layer_norm_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    (x, scale, bias), (t, scale_t, bias_t) = primals, tangents
    normal, inverse = _barrier(_normalise(x, epsilon))
    t = t.astype(normal.dtype)
    t = t - jnp.mean(t, axis=-1, keepdims=True) - normal * jnp.mean(t * normal, axis=-1, keepdims=True)
    y = normal * _wide(scale, x) + _wide(bias, x)
    return y, (inverse * t * _wide(scale, x) + normal * _wide(scale_t, x) + _wide(bias_t, x)).astype(y.dtype)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Return the softmax of ``x`` over its last axis."""
    shifted = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return shifted / jnp.sum(shifted, axis=-1, keepdims=True)


@softmax.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _softmax_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    p = _barrier(softmax(x))
    return p, p * (t - jnp.sum(p * t, axis=-1, keepdims=True))


def dropout(x: jax.Array, rate: float, *, key: Key) -> jax.Array:
    """Return ``x`` with each entry 0 with probability ``rate`` in [0, 1), the others divided by ``1 - rate``.

    The bits are a keyed hash of each entry's index (a finaliser of the murmur kind, once for each word of the key): twenty
    times faster than threefry on a CPU, fused into the consumer and equal under any sharding. Not for cryptography.
    """
    kept = _hash_bits(key, x.shape) >= np.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def _hash_bits(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 bits of ``shape``; indices are counted modulo 2**32."""
    bits = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.prod(shape[axis + 1 :], dtype=np.uint64) % 2**32
        bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride.astype(np.uint32)
    for word in jax.random.key_data(key).ravel():
        bits = bits ^ word
        # https://github.com/skeeto/hash-prospector: shifts and factors with the least bias found by search.
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
        bits = bits ^ (bits >> 16)
    return bits
