"""One tensor of all models, as a merge method sees it: whole in memory, or in tiles of bounded size.

A method is written once, as folds over the tensor (sums over its elements) and one map (the merged tensor). `Whole` holds
arrays and works under ``jit``, ``vmap`` and ``grad`` and on sharded arrays. The streaming engine implements the same two
operations over tiles of files. Merging in memory therefore equals merging by streaming.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.typing import Array


class Tile(NamedTuple):
    """The same range of one tensor in every model; all arrays have one shape and their stored types.

    For a method that works by rows, the last axis is the tensor's complete last axis: the shape is (rows, columns) for a
    streamed tensor, and the tensor's shape in memory. For other methods the shape is arbitrary.
    """

    base: Array | None
    models: tuple[Array, ...]
    start: Array | np.uint32 | int  # the flat position of the first element in the whole tensor
    statistics: tuple[Array, ...] = ()  # one per model, of the tile's shape: the Fisher information

    @property
    def origin(self) -> jax.Array:
        """The base in float32; zeros where the method has no base."""
        if self.base is None:
            return jnp.zeros(self.models[0].shape, jnp.float32)
        return jnp.asarray(self.base, jnp.float32)

    @property
    def values(self) -> list[jax.Array]:
        """The models in float32."""
        return [jnp.asarray(model, jnp.float32) for model in self.models]

    @property
    def deltas(self) -> list[jax.Array]:
        """The models minus the base, in float32; the models themselves without a base."""
        return self.values if self.base is None else [value - self.base.astype(jnp.float32) for value in self.values]

    @property
    def positions(self) -> jax.Array:
        """Every element's flat position in the whole tensor, uint32 (wraps beyond 2**32 elements)."""
        return positions(self.models[0].shape, self.start)


def positions(shape: tuple[int, ...], start: Array | np.uint32 | int = 0) -> jax.Array:
    """Return ``start`` plus each element's position in row-major order, uint32, of shape ``shape``."""
    result = jnp.zeros(shape, jnp.uint32) + jnp.asarray(start).astype(jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(prod(shape[axis + 1 :]))
        result = result + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return result


class Leaf(Protocol):
    """One tensor of all models."""

    @property
    def name(self) -> str:
        """The path in a tree, or the name in a file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        ...

    @property
    def count(self) -> int:
        """The number of models, without the base."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether changes are measured from a base."""
        ...

    def fold(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Return the sum over all tiles of ``function(tile, *args, **static)``, a pytree of small arrays.

        ``function`` is a pure function at the top level of a module; ``static`` are hashable and are compiled into its
        program. Sums of a streamed leaf are float64 NumPy arrays, for any types that ``function`` returns.
        """
        ...

    def map(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Return the merged tensor: ``function(tile, *args, **static)`` of every tile, float32 and shaped like the tile."""
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
    """Return ``values`` in float32: a JAX array, perhaps traced, for a JAX array, else a NumPy array.

    NumPy is faster here: outside a compiled program, every process compiles every JAX operation separately.
    """
    if isinstance(values, jax.Array):
        return jnp.asarray(values, jnp.float32)
    with np.errstate(over="ignore"):  # infinity, which is refused in the merged tensor
        return np.asarray(values, np.float32)


@cache
def program(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """Return ``function`` compiled once per shape of its arrays and per value of the arguments named ``static``."""
    return jax.jit(function, static_argnames=static)


def fold_all(leaves: Sequence[Leaf], function: Callable[..., Any], *args: Any, **static: Any) -> list[Any]:
    """Return ``leaf.fold(function, *args, **static)`` of every leaf; streamed leaves are folded in one pass."""
    if not leaves or isinstance(leaves[0], Whole):
        return [leaf.fold(function, *args, **static) for leaf in leaves]
    return leaves[0].fold_all(leaves, function, *args, **static)  # pyright: ignore
