"""The shared layers of the models: plain Linen, without deltas and masks.

Params are float32; the matrix products run in ``dtype`` (float32 or bfloat16); softmax and norms always run in float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.models.architecture import ModelConfig
from dsee_jax.ops.joint import JointDense
from dsee_jax.ops.nn import dropout, gelu, gelu_tanh, layer_norm, rms_norm, silu, softmax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": silu,
}
"""By their names in Hugging Face's ``hidden_act``."""


def init(config: ModelConfig) -> Callable[..., Any]:
    """Return the initializer of kernels and embedding tables."""
    return nn.initializers.normal(config.initializer_range)


class LayerNorm(nn.Module):
    """Layer norm over the last axis; params ``scale`` and ``bias`` (width,); computed in float32, returned in ``dtype``."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x`` (..., width)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class RmsNorm(nn.Module):
    """Root mean square norm over the last axis; param ``scale`` (width,); computed in float32, returned in ``dtype``."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x`` (..., width)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, self.epsilon).astype(self.dtype)


class Dropout(nn.Module):
    """Dropout with the key stream ``dropout``; no random number is drawn if deterministic or if the rate is 0."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Drop entries of ``x`` unless ``deterministic``."""
        return x if deterministic or not self.rate else dropout(x, self.rate, key=self.make_rng("dropout"))


class Bias(nn.Module):
    """An affine map whose inputs are all pruned: only its ``bias`` (width,), in ``dtype``, at every position."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (..., width) for ``x`` (..., any)."""
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        return jnp.broadcast_to(bias.astype(self.dtype), (*x.shape[:-1], self.width))


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself (arXiv 1706.03762, section 3.2); params query, key, value, output.

    An attention without heads is the bias of its output.
    """

    heads: int
    head_size: int
    dropout_rate: float
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    width: int = 0
    """The output width; 0: heads * head_size."""
    unbiased: tuple[str, ...] = ()
    """The projections (of query, key and value) without a bias."""
    terms: int = 1
    """The number of products that are summed in a score; scores are divided by sqrt(terms * head_size)."""

    def setup(self) -> None:
        """Declare the projections; sharing the scope puts their params at ``query``, not ``projections/query``."""
        inner = self.heads * self.head_size
        if not inner:
            self.output = Bias(self.width, self.dtype)
            return
        self.projections = JointDense(
            ("query", "key", "value"), (inner,) * 3, self.dtype, self.kernel_init, self.unbiased
        )
        nn.share_scope(self, self.projections)
        self.output = nn.Dense(self.width or inner, dtype=self.dtype, kernel_init=self.kernel_init)
        self.dropout = Dropout(self.dropout_rate)

    def scores(self, query: jax.Array, key: jax.Array, deterministic: bool, *context: Any) -> jax.Array:
        """Return float32 (batch, heads, queries, keys) of a scaled query and a key, both (batch, heads, any, size)."""
        del deterministic, context
        return jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        deterministic: bool = True,
        queries: int | None = None,
        *context: Any,
    ) -> jax.Array:
        """Attend.

        Args:
          x: (batch, length, width).
          mask: bool, broadcasts to (batch, heads, length, length), queries before keys; True = visible. A query that sees
            no key gets the mean of all values, never NaN.
          deterministic: no dropout.
          queries: the number of leading positions whose output is computed; None: all.
          *context: further arguments of `scores`.

        Returns:
          (batch, queries, width).
        """
        if not self.heads:
            return self.output(x[:, :queries])
        shape = (*x.shape[:2], self.heads, self.head_size)
        # XLA on CPUs multiplies arrays in this order of axes, and copies those of another order.
        query, key, value = (jnp.swapaxes(part.reshape(shape), 1, 2) for part in self.projections(x))
        query = query[:, :, :queries] / np.sqrt(self.terms * self.head_size).astype(query.dtype)
        scores = self.scores(query, key, deterministic, *context)
        weights = softmax(jnp.where(mask[..., :queries, :], scores, jnp.finfo(jnp.float32).min))
        weights = self.dropout(weights, deterministic).astype(self.dtype)
        mixed = jnp.swapaxes(jnp.matmul(weights, value), 1, 2)
        return self.output(mixed.reshape(*mixed.shape[:2], self.heads * self.head_size))


class Mlp(nn.Module):
    """The feed-forward pair ``down(activation(up(x)))`` (arXiv 1706.03762, section 3.3); without neurons: the last bias."""

    neurons: int
    activation: str
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (..., width) for ``x`` (..., width)."""
        if not self.neurons:
            return Bias(x.shape[-1], self.dtype, name="down")(x)
        up = nn.Dense(self.neurons, dtype=self.dtype, kernel_init=self.kernel_init, name="up")(x)
        down = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name="down")
        return down(ACTIVATIONS[self.activation](up))
