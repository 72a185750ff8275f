"""Devices as a mesh ``data x fsdp x tensor``, and where every array of a run lies on it.

``data`` and ``fsdp`` divide the rows of a batch. ``fsdp`` divides weights too: each device keeps its part of the width and
gathers a kernel when a layer needs it. ``tensor`` divides heads, neurons and words, and what is computed of them. The tables
AXES of the architectures name the axes of params; `RULES` say what mesh axis takes which.

Updates lie as their kernels do: A divided along its inputs, B along its outputs. Masks lie as their kernels do. Supports and
sparse values are whole on every device: of 64 values a step moves 256 bytes a kernel, which is less than the coordinates of
one shard would take, and no device waits for another to say which values are its own.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsee_jax import models, tree
from dsee_jax.config import MeshConfig
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""The mesh axes that divide the rows of a batch."""

RULES: tuple[tuple[str, str | None], ...] = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("vocab", None),
)
"""(logical axis, mesh axis), in order: the first of an axis that divides it evenly counts; None: it is not divided."""

_SECTIONS = ("params", "masks", "deltas", "supports", "coefficients")
_FREE = PartitionSpec.UNCONSTRAINED


class Placement(NamedTuple):
    """A mesh, and how the params of one model lie on it."""

    mesh: Mesh
    specs: Mapping[str, PartitionSpec]  # by path

    def sharding(self, path: str) -> NamedSharding:
        """Return where the param at ``path`` lies."""
        return NamedSharding(self.mesh, self.specs[path])


def mesh(config: MeshConfig, *, batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of ``devices``, by default all there are, axes `AXES`; an axis of -1 takes what the others leave.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or the batch does not divide over its rows.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in AXES}
    open_axes = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(f"mesh.{name} is {size}; use a number of devices, or -1 for all that are left")
    if len(open_axes) > 1:
        raise InputError(f"mesh.{' and mesh.'.join(open_axes)} are -1; only one of them can take what is left")
    given = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % given or (not open_axes and given != len(devices)):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"the mesh {shape} does not fit {len(devices)} devices: its sizes must multiply to {len(devices)}, or to a "
            "divisor of that with one of them -1"
        )
    for name in open_axes:
        sizes[name] = len(devices) // given
    rows = sizes["data"] * sizes["fsdp"]
    if batch_size % rows:
        raise InputError(
            f"train.batch_size is {batch_size}; it must be a multiple of mesh.data x mesh.fsdp = {sizes['data']} x "
            f"{sizes['fsdp']} = {rows}"
        )
    shape = tuple(sizes.values())
    try:
        # Neighbours on a mesh axis are neighbours on the machine, where it says how its devices are linked.
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        # Links that it knows nothing of, those between slices for one.
        log.warning("devices are laid on the mesh %s in their own order, not along their links", shape)
        laid = np.reshape(np.array(devices, dtype=object), shape)
    return Mesh(laid, AXES)


def placement(where: Mesh, model: Any) -> Placement:
    """Return how the params of a model lie on a mesh; of a model that was cut, what does not divide is not divided.

    Raises:
      InputError: an axis that a mesh axis does not divide, with the sizes that would.
    """
    config, tensor = model.config, where.shape["tensor"]
    cut = config != config.with_widths()
    # Heads and neurons are divided whole, never in the middle of one.
    uneven = [
        (kind, layer, width)
        for kind, widths in config.widths.items()
        for layer, width in enumerate(widths)
        if width % tensor
    ]
    if uneven and not cut:
        kind, layer, width = uneven[0]
        raise InputError(
            f"mesh.tensor is {tensor}; layer {layer} has {width} {kind}, which it does not divide: {_divisors(width)}"
        )
    table = models.find(config.model_type).AXES
    whole = {"heads", "mlp"} if uneven else set()
    specs = {}
    for path, leaf in tree.flatten(models.shapes(model)).items():
        names = next(names for pattern, names in table if re.fullmatch(pattern, path))
        # A vector of the width is smaller than what it would take to gather it.
        mine = whole | ({"embed"} if len(names) == 1 else set())
        stacked = (None,) * (leaf.ndim - len(names))
        divided = [None if name in mine else name for name in (*stacked, *names)]
        specs[path] = _spec(path, divided, leaf.shape, where)
    return Placement(where, specs)


def _spec(path: str, names: Sequence[str | None], shape: Sequence[int], where: Mesh) -> PartitionSpec:
    taken: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        options = [axis for logical, axis in RULES if logical == name] if name else [None]
        fitting = [axis for axis in options if axis is None or size % where.shape[axis] == 0]
        if not fitting:
            raise InputError(
                f"mesh.{options[0]} is {where.shape[options[0]]}; the axis {name!r} of {path!r} has {size} entries, which it "
                f"does not divide: {_divisors(size)}"
            )
        taken.append(fitting[0] if fitting[0] not in taken else None)
    return PartitionSpec(*(axis if axis and where.shape[axis] > 1 else None for axis in taken))


def _divisors(size: int) -> str:
    found = [str(number) for number in range(1, min(size, 512) + 1) if size % number == 0]
    return f"use {', '.join(found[:-1])} or {found[-1]}" if found[1:] else "use 1"


def shardings(placed: Placement, values: Any) -> Any:
    """Return a tree like ``values`` of where its leaves lie.

    Any tree of this library will do, states and optimiser moments too: what hangs below ``params``, ``masks`` or ``deltas``
    lies as the params of the same paths, everything else is whole on every device.
    """
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(placed.mesh, _of(placed, path, leaf)), values)


def _of(placed: Placement, path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    section = next((number for number, key in enumerate(keys) if key in _SECTIONS), None)
    if section is None or keys[section] in ("supports", "coefficients"):
        return PartitionSpec()
    rest = keys[section + 1 :]
    if keys[section] != "deltas":
        return placed.specs.get("/".join(rest), PartitionSpec())
    spec, part = placed.specs["/".join(rest[:-1])], rest[-1]
    *stacked, rows, columns = spec
    return {"a": PartitionSpec(*stacked, rows, None), "b": PartitionSpec(*stacked, None, columns)}.get(
        part, PartitionSpec()
    )


def place(placed: Placement, values: Any) -> Any:
    """Put any tree of this library on the mesh; see `shardings`. What is not yet there is the same on every process."""
    where = shardings(placed, values)
    if not multihost.is_distributed():
        return jax.device_put(values, where)

    def one(leaf: Any, to: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, to)
        # Each process its own part: jax.device_put would first send all of it round, to compare.
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, to, lambda part: leaf[part])

    return jax.tree.map(one, values, where)


def split(where: Mesh, batch: Any) -> Any:
    """Put a batch on the mesh, its leading axis over `ROWS`; each process puts the rows of its own devices only."""
    rows = NamedSharding(where, PartitionSpec(ROWS))
    if rows.is_fully_addressable:
        return jax.device_put(batch, rows)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda part, x=x: x[part]), batch)


@contextlib.contextmanager
def rows_divided(where: Mesh) -> Iterator[None]:
    """Keep what modules return divided by rows, (rows, length, width), while a model is traced.

    Without it the compiler is free to gather the rows and leave the weights where they are, whichever it takes for cheaper.
    """
    count = where.shape["data"] * where.shape["fsdp"]
    if count == 1:
        yield
        return

    def divided(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found = call(*args, **kwargs)
        return jax.tree.map(constrained, found) if context.method_name == "__call__" else found

    def constrained(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.ndim != 3 or x.shape[0] % count:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(where, PartitionSpec(ROWS, _FREE, _FREE)))

    with nn.intercept_methods(divided):
        yield
