"""Attention of decoders: to earlier tokens only, query heads in groups that share keys and values, with a cache."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax import ops
from dsee_jax.models.cache import Context
from dsee_jax.models.layers import Bias, Dropout, JointDense, RmsNorm
from dsee_jax.models.rope import rotate


class CausalAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); params query, key, value, output, and query_norm, key_norm where asked.

    Without groups it is the bias of its output, or nothing.
    """

    groups: int
    """Heads of keys and values; those of queries that read group g stand side by side."""
    per_group: int
    """Query heads of a group."""
    head_size: int
    width: int
    scale: float
    """Of the scores."""
    window: int | None = None
    """A token sees so many tokens, itself included; None: all before it."""
    use_bias: bool = True
    use_output_bias: bool = True
    norm_epsilon: float | None = None
    """Of a root mean square norm of every query and key head; None: no norm."""
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    def setup(self) -> None:
        """Declare the projections; sharing the scope puts their params at ``query``, not ``projections/query``."""
        if self.norm_epsilon is not None:
            self.query_norm = RmsNorm(self.norm_epsilon, self.dtype)
            self.key_norm = RmsNorm(self.norm_epsilon, self.dtype)
        if not self.groups:
            if self.use_output_bias:
                self.output = Bias(self.width, self.dtype)
            return
        inner = self.groups * self.head_size
        names, widths = ("query", "key", "value"), (inner * self.per_group, inner, inner)
        unbiased = () if self.use_bias else names
        self.projections = JointDense(names, widths, self.dtype, self.kernel_init, unbiased)
        nn.share_scope(self, self.projections)
        self.output = nn.Dense(
            self.width, use_bias=self.use_output_bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        cache: Mapping[str, jax.Array] | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
        """Attend.

        Args:
          x: (batch, length, width).
          context: of the call. A token that may see nothing gets the mean of all values, never NaN.
          rotation: cosines and sines of its positions, `dsee_jax.models.rope`; None: positions are not turned in here.
          cache: ``key`` and ``value`` (batch, keys, groups, head size) of this layer, or None.
          deterministic: no dropout of the attention weights.

        Returns:
          (batch, length, width), and the cache with the keys and values of ``x`` written.
        """
        if not self.groups:
            if self.norm_epsilon is not None:
                # They are not cut with the heads: a norm is one for all of them.
                nothing = jnp.zeros((1, self.head_size), self.dtype)
                self.query_norm(nothing), self.key_norm(nothing)
            return (self.output(x) if self.use_output_bias else jnp.zeros_like(x)), cache
        shape = (*x.shape[:2], -1, self.head_size)
        query, key, value = (part.reshape(shape) for part in self.projections(x))
        if self.norm_epsilon is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            at = (0, context.start, 0, 0)
            cache = {
                name: jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), at)
                for name, new in (("key", key), ("value", value))
            }
            key, value = cache["key"].astype(self.dtype), cache["value"].astype(self.dtype)
        visible = context.visible
        if self.window is not None:
            visible &= context.distance < self.window
        query = query.reshape(*x.shape[:2], self.groups, self.per_group, self.head_size)
        scores = jnp.einsum("bqghd,bkgd->bghqk", query, key, preferred_element_type=jnp.float32) * self.scale
        weights = ops.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min))
        weights = self.dropout(weights, deterministic).astype(self.dtype)
        mixed = jnp.einsum("bghqk,bkgd->bqghd", weights, value)
        return self.output(mixed.reshape(*x.shape[:2], -1)), cache
