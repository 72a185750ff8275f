"""Stacked layers: the leaves of ``layer_0``, ``layer_1`` ... stacked on a leading axis, below ``layers``.

::

    decoder/layer_0/mlp/up/kernel (in, out)
    decoder/layer_1/mlp/up/kernel (in, out)      <->      decoder/layers/mlp/up/kernel (2, in, out)

A model with ``scan=True`` runs a stacked tree by ``jax.lax.scan``: one layer is compiled, whatever the depth. Params, deltas,
supports and masks stack alike; files hold separate layers.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.typing import Tree

STACK = "layers"
"""The path component of all stacked layers."""

_LAYER = re.compile(r"(?:(.*)/)?layer_(\d+)/(.*)")
# A number below `layers` is the index of a separate layer in a list.
_STACKED = re.compile(rf"(?:(.*)/)?{STACK}/(?!\d+(?:/|$))(.*)")


def place(path: str) -> tuple[str, int | None]:
    """Return the stacked path of a path, and its layer number; None for a path outside the layers."""
    match = _LAYER.fullmatch(path)
    if not match:
        return path, None
    before, number, rest = match.groups()
    return "/".join(filter(None, (before, STACK, rest))), int(number)


def is_stacked(path: str) -> bool:
    """Return whether the array at ``path`` holds all layers on its leading axis."""
    return _STACKED.fullmatch(path) is not None


def paths(path: str, layers: int) -> list[str]:
    """Return the path of each layer of a stacked path, the inverse of `place`; the path itself outside the layers."""
    match = _STACKED.fullmatch(path)
    if not match:
        return [path]
    before, rest = match.groups()
    return ["/".join(filter(None, (before, f"layer_{number}", rest))) for number in range(layers)]


def groups(flat: Iterable[str]) -> dict[str, list[str]]:
    """Return ``{stacked path: paths of its layers, in order}``; a path outside the layers maps to itself.

    Raises:
      InputError: a layer lacks a path that another layer has.
    """
    members: dict[str, dict[int, str]] = {}
    for path in flat:
        stacked, number = place(path)
        members.setdefault(stacked, {})[-1 if number is None else number] = path
    depth = max((max(numbers) + 1 for numbers in members.values()), default=0)
    for stacked, numbers in members.items():
        missing = set(range(depth)) - numbers.keys()
        if missing and -1 not in numbers:
            raise InputError(
                f"layer {min(missing)} has no {paths(stacked, depth)[min(missing)]!r}, which another layer has: layers that "
                "differ cannot be scanned, set model.scan to false"
            )
    return {stacked: [numbers[number] for number in sorted(numbers)] for stacked, numbers in members.items()}


def stack(layered: Tree) -> dict[str, Any]:
    """Return a tree with the leaves of its layers stacked; NumPy arrays stay NumPy arrays.

    Raises:
      InputError: layers differ in their paths or shapes.
    """
    flat = tree.flatten(layered)
    stacked: dict[str, Any] = {}
    for path, members in groups(flat).items():
        leaves = [flat[member] for member in members]
        if members == [path]:
            stacked[path] = leaves[0]
            continue
        shapes = {tuple(leaf.shape) for leaf in leaves}
        if len(shapes) > 1:
            raise InputError(
                f"{path!r} has the shapes {', '.join(map(str, sorted(shapes)))} in its layers: layers that differ cannot be "
                "scanned, set model.scan to false"
            )
        numpy = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        stacked[path] = numpy.stack(leaves)
    return tree.unflatten(stacked)


def unstack(stacked: Tree) -> dict[str, Any]:
    """Return a tree with separate layers, the inverse of `stack`; of NumPy arrays, views."""
    flat: dict[str, Any] = {}
    for path, leaf in tree.flatten(stacked).items():
        members = paths(path, leaf.shape[0]) if leaf.shape else [path]
        flat |= {path: leaf} if members == [path] else {member: leaf[n] for n, member in enumerate(members)}
    return tree.unflatten(flat)
