"""Several affine maps of one input as one Linen module; updates are attached to it as to an ``nn.Dense``."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Affine(nn.Module):
    """Holds and returns one ``kernel`` (in, out) and an optional ``bias`` (out,); `JointDense` computes the product."""

    features: int
    kernel_init: Callable[..., Any]
    biased: bool = True

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array]:
        """Return the kernel (width, features) and the bias (features,), zeros if there is no bias."""
        kernel = self.param("kernel", self.kernel_init, (width, self.features), jnp.float32)
        if not self.biased:
            return kernel, jnp.zeros(self.features, jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


class JointDense(nn.Module):
    """Several affine maps of one input in one matrix product; each map has its own params, under its name in ``joint``.

    Attributes:
      joint: the names of the children that hold ``kernel`` (in, out) and ``bias`` (out,); updates are attached by these names.
      features: the output width of each.
      unbiased: the names of the maps without a bias.
    """

    joint: tuple[str, ...]
    features: tuple[int, ...]
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    unbiased: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Return one (..., features[i]) per name for ``x`` (..., in)."""
        parts = [
            Affine(features, self.kernel_init, name not in self.unbiased, name=name)(x.shape[-1])
            for name, features in zip(self.joint, self.features, strict=True)
        ]
        kernel = jnp.concatenate([kernel for kernel, _ in parts], axis=1).astype(self.dtype)
        y = x.astype(self.dtype) @ kernel
        if len(self.unbiased) < len(self.joint):
            bias = jnp.concatenate([bias for _, bias in parts]).astype(self.dtype)
            y += bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return tuple(jnp.split(y, np.cumsum(self.features)[:-1].tolist(), axis=-1))
