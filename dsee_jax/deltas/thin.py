"""The product of a layer's input and an update, added to the output of the layer: thin, without an array of a kernel's size.

A layer takes it where its kernel is one matrix: an affine map over any axes, an einsum that is a product of matrices, a 1 x 1
convolution. Linen and NNX give the attributes of these layers the same names.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsee_jax import orientation
from dsee_jax.auto_axes import auto_sharded, spec
from dsee_jax.deltas.adapter import Update
from dsee_jax.errors import InputError
from dsee_jax.ops import dense
from dsee_jax.typing import Array


def check_orientation(path: str, update: Update, layer: object, expected: str) -> None:
    """Raise `InputError` unless a layer that multiplies by the orientation ``expected`` can take the update of its kernel."""
    if update.orientation != expected:
        raise InputError(
            f"the orientation of {path!r} is {update.orientation!r}, and {type(layer).__name__} multiplies by it as "
            f"{expected!r}: give its rule in delta.targets {{'orientation': {expected!r}}}"
        )


def move_stacks(axes: str, arrays: Any, *, back: bool) -> Any:
    """Return arrays (stack..., any...) with their stacks at the axes where the kernel has them, or ``back`` at the front.

    A loop over an axis of the params then takes the same layer of the kernel and of its update.
    """
    places = [place for place, word in enumerate(axes.split("_")) if word == "stack"]
    front = list(range(len(places)))
    if places == front:
        return arrays
    if places[-1] > len(places):
        raise InputError(f"the orientation is {axes!r}; attached updates need the stack at the first or second axis")
    return jax.tree.map(lambda x: jnp.moveaxis(x, *((places, front) if back else (front, places))), arrays)


def product(x: Array, y: Array, update: Update, shape: Sequence[int], scale: Mapping[str, Any]) -> jax.Array:
    """Return the product of ``x`` (..., in) and the update of a kernel of ``shape``, (..., out), in the precision of ``y``."""
    *_, features = orientation.matrix_shape(shape, update.orientation)
    x = jnp.asarray(x, y.dtype)
    return dense.update(x, update.delta, update.support, features=features, **scale)


def _joined(x: Array, axes: Sequence[int]) -> Array:
    """Return ``x`` with the axes joined, in their order, as the last axis."""
    places = sorted(axis % x.ndim for axis in axes)
    x = jnp.moveaxis(x, places, range(-len(places), 0))
    return x.reshape(*x.shape[: x.ndim - len(places)], -1)


def add(
    x: Array,
    y: jax.Array,
    update: Update,
    shape: Sequence[int],
    scale: Mapping[str, Any],
    *,
    axes: Sequence[int] = (-1,),
) -> jax.Array:
    """Return ``y`` (..., out...), the output of a layer for ``x``, plus the product of ``x`` and the update.

    Args:
      x: the input.
      y: the output of the layer with the frozen kernel.
      update: the update of the kernel.
      shape: the shape of the kernel.
      scale: ``scale`` and ``scale_sparse`` of the adapter.
      axes: the input axes of ``x``; the kernel has them in the order of ``x``.
    """

    def added(x: Array, y: jax.Array, update: Update, scale: Mapping[str, Any]) -> jax.Array:
        return (y + product(_joined(x, axes), y, update, shape, scale).reshape(y.shape)).astype(y.dtype)

    return auto_sharded(added, x, y, update, scale, out=spec(y))


def general_orientation(inputs: int, outputs: int) -> str:
    """Return the orientation of an affine map of ``inputs`` axes to ``outputs`` axes."""
    return "_".join(["in"] * inputs + ["out"] * outputs)


def pointwise_orientation(conv: Any) -> str | None:
    """Return the orientation of the kernel of a 1 x 1 convolution; None for any other convolution."""
    sizes, strides = (
        [value] if isinstance(value, int) else [*(value or ())] for value in (conv.kernel_size, conv.strides)
    )
    ones = math.prod(sizes) == math.prod(strides) == 1
    whole = ones and conv.feature_group_count == 1 and isinstance(conv.padding, str) and conv.mask is None
    return "_".join(["1"] * len(sizes) + [orientation.IN_OUT]) if whole else None


class Einsum(NamedTuple):
    """An einsum of an input and a kernel that is a product of matrices; every axis is one letter."""

    left: str
    kernel: str
    right: str

    @property
    def orientation(self) -> str:
        """The orientation of the kernel."""
        return "_".join("in" if letter in self.left else "out" for letter in self.kernel)

    def add(self, x: Array, y: jax.Array, update: Update, shape: Sequence[int], scale: Mapping[str, Any]) -> jax.Array:
        """Return ``y``, the output of the einsum for ``x``, plus the product of ``x`` and the update, as `add` does."""
        inputs, outputs = ([each for each in self.kernel if (each in self.left) == inside] for inside in (True, False))
        rest = [letter for letter in self.left if letter not in self.kernel]
        sizes = dict(zip(self.kernel, shape, strict=True))

        def added(x: Array, y: jax.Array, update: Update, scale: Mapping[str, Any]) -> jax.Array:
            x = jnp.einsum(f"{self.left}->{''.join(rest + inputs)}", x)
            x = x.reshape(*x.shape[: len(rest)], -1)
            thin = product(x, y, update, shape, scale).reshape(*x.shape[:-1], *(sizes[letter] for letter in outputs))
            return (y + jnp.einsum(f"{''.join(rest + outputs)}->{self.right}", thin)).astype(y.dtype)

        return auto_sharded(added, x, y, update, scale, out=spec(y))


def einsum(equation: str) -> Einsum | None:
    """Return the parts of an equation that is a product of matrices; None for any other equation."""
    inputs, _, right = equation.replace(" ", "").partition("->")
    left, _, kernel = inputs.partition(",")
    parts = (left, kernel, right)
    simple = all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    contracted, free = set(kernel) & set(left), set(kernel) - set(left)
    if not simple or contracted & set(right) or set(right) != (set(left) - contracted) | free or not contracted:
        return None
    return Einsum(*parts) if free else None
