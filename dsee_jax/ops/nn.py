"""Activations, norms, softmax and dropout of single arrays, with gradient rules that save few residuals.

The gradient rules of activations save their input alone: to evaluate ``erf`` or ``exp`` again costs less than to write an
array of that size. Those of norms and softmax put the values that they reuse behind an optimisation barrier. Without the
barrier, XLA fuses the statistics into every consumer and evaluates them again, which costs more on a CPU than a read from
memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.ops.dense import accumulator, wide
from dsee_jax.typing import Array, Key

barrier = jax.lax.optimization_barrier


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return ``x * Phi(x)``; Phi is the normal distribution function, by ``erf`` (arXiv 1606.08415)."""
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@gelu.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _gelu_jvp(primals: Any, tangents: Any) -> Any:
    return gelu(*primals), _times(_gelu_slope, *primals, *tangents)


def _gelu_slope(x: jax.Array) -> jax.Array:
    density = jnp.exp(-0.5 * jnp.square(x)) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return _normal_cdf(x) + x * density


@jax.custom_jvp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """Return the tanh approximation of `gelu` (arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1.0 + _gelu_tanh(x))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(np.sqrt(2.0 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3))


@gelu_tanh.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _gelu_tanh_jvp(primals: Any, tangents: Any) -> Any:
    return gelu_tanh(*primals), _times(_gelu_tanh_slope, *primals, *tangents)


def _gelu_tanh_slope(x: jax.Array) -> jax.Array:
    tanh = _gelu_tanh(x)
    inner = np.sqrt(2.0 / np.pi).astype(x.dtype) * (1.0 + 3 * 0.044715 * jnp.square(x))
    return 0.5 * (1.0 + tanh + x * (1.0 - jnp.square(tanh)) * inner)


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
    """Return ``x * sigmoid(x)`` (arXiv 1702.03118)."""
    return x * jax.nn.sigmoid(x)


@silu.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _silu_jvp(primals: Any, tangents: Any) -> Any:
    return silu(*primals), _times(_silu_slope, *primals, *tangents)


def _silu_slope(x: jax.Array) -> jax.Array:
    gate = jax.nn.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


@functools.partial(jax.checkpoint, static_argnums=0)
def _times(slope: Callable[[jax.Array], jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
    """Return ``t * slope(x)``; the gradient computes the slope again from ``x``, where JAX would save it."""
    return t * slope(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, epsilon: float) -> jax.Array:
    """Return ``x`` (..., width) divided by the root of its mean square over the last axis, then scaled (arXiv 1910.07467).

    ``scale`` has shape (width,). Statistics and result are float32 (float64 for float64 input).
    """
    x = jnp.asarray(x, accumulator(x.dtype))
    return x * _inverse_root(x, epsilon) * wide(scale, x)


def _inverse_root(x: jax.Array, epsilon: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


@rms_norm.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _rms_norm_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    (x, scale), (t, scale_t) = primals, tangents
    x = jnp.asarray(x, accumulator(x.dtype))
    inverse = barrier(_inverse_root(x, epsilon))
    normal, t = x * inverse, t.astype(x.dtype)
    y = normal * wide(scale, x)
    t = inverse * (t - normal * jnp.mean(t * normal, axis=-1, keepdims=True))
    return y, (t * wide(scale, x) + normal * wide(scale_t, x)).astype(y.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> jax.Array:
    """Return ``x`` (..., width) normalised over its last axis, then scaled and shifted (arXiv 1607.06450).

    ``scale`` and ``bias`` have shape (width,). Statistics and result are float32 (float64 for float64 input).
    """
    normal, _ = _normalise(x, epsilon)
    return normal * wide(scale, x) + wide(bias, x)


def _normalise(x: Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(x, accumulator(x.dtype))
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


@layer_norm.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _layer_norm_jvp(epsilon: float, primals: Any, tangents: Any) -> Any:
    (x, scale, bias), (t, scale_t, bias_t) = primals, tangents
    normal, inverse = barrier(_normalise(x, epsilon))
    t = t.astype(normal.dtype)
    t = t - jnp.mean(t, axis=-1, keepdims=True) - normal * jnp.mean(t * normal, axis=-1, keepdims=True)
    y = normal * wide(scale, x) + wide(bias, x)
    return y, (inverse * t * wide(scale, x) + normal * wide(scale_t, x) + wide(bias_t, x)).astype(y.dtype)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Return the softmax of ``x`` over its last axis."""
    shifted = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return shifted / jnp.sum(shifted, axis=-1, keepdims=True)


@softmax.defjvp  # pyright: ignore[reportFunctionMemberAccess]
def _softmax_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    p = barrier(softmax(x))
    return p, p * (t - jnp.sum(p * t, axis=-1, keepdims=True))


def dropout(x: jax.Array, rate: float, *, key: Key) -> jax.Array:
    """Return ``x`` with each entry 0 with probability ``rate`` in [0, 1), the others divided by ``1 - rate``.

    The bits are a keyed hash of each entry's index (a finaliser like that of murmur, once per word of the key). The hash is
    twenty times faster than threefry on a CPU, is fused into the consumer, and is equal under any sharding. It is not for
    cryptography.
    """
    kept = _hash_bits(key, x.shape) >= np.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def _hash_bits(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 bits of ``shape``; indices wrap around at 2**32."""
    bits = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.prod(shape[axis + 1 :], dtype=np.uint64) % 2**32
        bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride.astype(np.uint32)
    for word in jax.random.key_data(key).ravel():
        bits = bits ^ word
        # https://github.com/skeeto/hash-prospector: the shifts and factors with the least bias in a search.
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
        bits = bits ^ (bits >> 16)
    return bits
