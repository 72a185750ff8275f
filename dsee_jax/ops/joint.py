"""Several affine maps of one input as one Linen module; updates are attached to it as to an ``nn.Dense``."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.ops.dense import joint_products, wide


class Affine(nn.Module):
    """Holds and returns one ``kernel`` (in, out) and an optional ``bias`` (out,); `JointDense` computes the product."""

    features: int
    kernel_init: Callable[..., Any]
    biased: bool = True

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Return the kernel (width, features) and the bias (features,), or None if there is no bias."""
        kernel = self.param("kernel", self.kernel_init, (width, self.features), jnp.float32)
        if not self.biased:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)


class JointDense(nn.Module):
    """Several affine maps of one input, in one matrix product for many rows of it.

    Each map has its own params, under its name in ``joint``.

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
        outputs = joint_products(x.astype(self.dtype), [kernel for kernel, _ in parts])
        return tuple(
            y if bias is None else y + wide(bias, y).astype(y.dtype)
            for y, (_, bias) in zip(outputs, parts, strict=True)
        )
