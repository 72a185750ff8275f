"""One tensor of all models, as a merge method sees it: in memory at once, or in tiles of bounded size.

A method is written once, as folds over the tensor (sums over its elements) and one map (the merged tensor). `Whole` holds
arrays and works under ``jit``, ``vmap`` and ``grad`` and on sharded arrays; the streaming engine offers the same two
operations over tiles of files. So merging in memory equals merging by streaming by construction.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.aliases import Array


class Tile(NamedTuple):
    """The same stretch of one tensor in every model; all arrays of one shape, in the types they are stored in.

    For a method by rows its last axis is the tensor's and complete, so that rows can be summed over axis -1: (rows, columns)
    of a streamed tensor, the tensor's own shape in memory. Otherwise any shape.
    """

    base: Array | None
    models: tuple[Array, ...]
    start: Array | np.uint32 | int  # the flat position of the first element in the whole tensor
    statistics: tuple[Array, ...] = ()  # one for each model, of the tensor's shape: what `fisher` weighs by

    @property
    def origin(self) -> jax.Array:
        """The base in float32; zeros where a method does without a base."""
        if self.base is None:
            return jnp.zeros(self.models[0].shape, jnp.float32)
        return jnp.asarray(self.base, jnp.float32)

    @property
    def values(self) -> list[jax.Array]:
        """The models in float32."""
        return [jnp.asarray(model, jnp.float32) for model in self.models]

    @property
    def deltas(self) -> list[jax.Array]:
        """The models less the base, in float32; the models themselves where there is no base."""
        return self.values if self.base is None else [value - self.base.astype(jnp.float32) for value in self.values]

    @property
    def positions(self) -> jax.Array:
        """The flat position in the whole tensor of every element, uint32 (wraps beyond 2**32 elements)."""
        return positions(self.models[0].shape, self.start)


def positions(shape: tuple[int, ...], start: Array | np.uint32 | int = 0) -> jax.Array:
    """Return ``start`` plus each element's position in row-major order, uint32, of shape ``shape``."""
    found = jnp.zeros(shape, jnp.uint32) + jnp.asarray(start).astype(jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(prod(shape[axis + 1 :]))
        found = found + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return found


class Leaf(Protocol):
    """One tensor of all models."""

    @property
    def name(self) -> str:
        """Its path in a tree, or its name in a file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    @property
    def count(self) -> int:
        """How many models there are, the base apart."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether changes are measured from a base."""
        ...

    def fold(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Return the sum over all tiles of ``function(tile, *args, **static)``, a pytree of small arrays.

        ``function`` is a pure function at the top level of a module; ``static`` are hashable and choose its program.
        Sums of a streamed leaf are float64 NumPy arrays, whatever ``function`` returns.
        """
        ...

    def map(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Return the merged tensor: ``function(tile, *args, **static)``, float32 and shaped like its tile, of every tile."""
        ...


class Whole(NamedTuple):
    """A `Leaf` in memory: arrays of one shape, with at least one axis."""

    name: str
    base: Array | None
    models: tuple[Array, ...]
    statistics: tuple[Array, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - see `Leaf`
        return self.models[0].shape

    @property
    def count(self) -> int:  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.models)

    @property
    def has_base(self) -> bool:  # noqa: D102
        return self.base is not None

    def fold(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:  # noqa: D102
        return program(function, *static)(Tile(self.base, self.models, 0, self.statistics), *args, **static)

    map = fold


def numbers(values: Any) -> Array:
    """Return ``values`` in float32: a NumPy array unless they are JAX's, perhaps traced.

    Outside of a program every operation of JAX is a program of its own, compiled anew in each process.
    """
    return jnp.asarray(values, jnp.float32) if isinstance(values, jax.Array) else np.asarray(values, np.float32)


@cache
def program(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """Return ``function`` compiled, once for each shape of its arrays and each value of the options named ``static``."""
    return jax.jit(function, static_argnames=static)


def fold_all(leaves: Sequence[Leaf], function: Callable[..., Any], *args: Any, **static: Any) -> list[Any]:
    """Return ``leaf.fold(function, *args, **static)`` of every leaf: one pass over the models when they are streamed."""
    if not leaves or isinstance(leaves[0], Whole):
        return [leaf.fold(function, *args, **static) for leaf in leaves]
    return leaves[0].fold_all(leaves, function, *args, **static)  # pyright: ignore
