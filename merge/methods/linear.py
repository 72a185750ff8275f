"""Weighted sums of models and of their changes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dsee_jax.aliases import Array


def linear(base: Array, models: Sequence[Array], weights: Array) -> jax.Array:
    """Return ``sum_m w_m t_m`` of tensors of one shape; ``weights`` (models,). The base does not enter."""
    del base
    return sum((w * jnp.asarray(t, jnp.float32) for w, t in zip(weights, models, strict=True)), jnp.float32(0))


def task_arithmetic(base: Array, models: Sequence[Array], weights: Array) -> jax.Array:
    """Return ``t0 + sum_m w_m (t_m - t0)`` (Ilharco et al. 2023, arXiv 2212.04089); ``weights`` (models,)."""
    start = jnp.asarray(base, jnp.float32)
    return start + sum(
        (w * (jnp.asarray(t, jnp.float32) - start) for w, t in zip(weights, models, strict=True)), jnp.float32(0)
    )
