"""Meshes with explicit axes, as ``jax.make_mesh`` makes them: functions in which the compiler chooses the shardings.

On explicit axes, JAX asks for the sharding of the result of every gather, scatter and ambiguous reshape. The functions of
this library state the shardings of their results alone.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

T = TypeVar("T")

Spec: TypeAlias = tuple[tuple[str, ...], ...]
"""For each axis of an array, the explicit axes of the mesh that shard it."""


def spec(array: Any) -> Spec:
    """Return the explicit axes that shard each axis of an array; none without a mesh, or of a mesh with other axes."""
    kind: Any = jax.typeof(array)
    return tuple(() if names is None else (names,) if isinstance(names, str) else names for names in kind.sharding.spec)


def auto_sharded(function: Callable[..., T], *args: Any, out: Spec | list[Spec]) -> T:
    """Return ``function(*args)``; on explicit axes with the sharding ``out``, and the compiler shards all within.

    Without explicit axes, it is just the call. Eager code needs the mesh of ``jax.set_mesh``, as in JAX itself.

    Args:
      function: any function.
      *args: pytrees; their arrays are those that the function may use.
      out: the `spec` of the result, or the list of the specs of a tuple of results. Where two axes of a result name the same
        axis of the mesh, the first has it.
    """
    leaves, structure = jax.tree.flatten(args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    kinds: list[Any] = [jax.typeof(leaves[place]) for place in places]
    mesh = next((kind.sharding.mesh for kind in kinds if kind.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return function(*args)

    def of_arrays(*arrays: jax.Array) -> T:
        merged = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            merged[place] = array
        return function(*structure.unflatten(merged))

    def sharding(spec: Spec) -> Any:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*_distinct(spec)))

    # Arrays without the mesh are put on it first: otherwise their cotangents would have axes that the arrays lack.
    arrays = [
        leaves[place] if kind.sharding.mesh.explicit_axes else jax.sharding.reshard(leaves[place], sharding(()))
        for place, kind in zip(places, kinds, strict=True)
    ]
    shardings = tuple(map(sharding, out)) if isinstance(out, list) else sharding(out)
    automatic: Any = jax.sharding.auto_axes(of_arrays, axes=mesh.explicit_axes, out_sharding=shardings)
    return automatic(*arrays)


def _distinct(spec: Spec) -> Spec:
    """Return a spec in which every axis of the mesh is at the first of its places alone."""
    used: set[str] = set()
    distinct: list[tuple[str, ...]] = []
    for names in spec:
        distinct.append(tuple(name for name in names if name not in used))
        used.update(names)
    return tuple(distinct)
