"""The device mesh ``data x fsdp x tensor``, and the sharding of every array of a run.

``data`` and ``fsdp`` shard the rows of a batch. ``fsdp`` also shards the width of weights; each layer all-gathers its kernels.
``tensor`` shards heads, neurons and the vocabulary, and the activations computed from them. The tables AXES of the
architectures name the logical axes of params; `RULES` map these to mesh axes.

Updates are sharded like their kernels: A along its inputs, B along its outputs. Masks are sharded like their kernels. Supports
and sparse values are replicated: 64 values are 256 bytes of traffic per kernel and step, less than the coordinates of one
shard, and no device has to find out which values are its own.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsee_jax import models, tree
from dsee_jax.config import MeshConfig
from dsee_jax.deltas.attach import intercepted
from dsee_jax.errors import InputError
from dsee_jax.models import hf_config
from dsee_jax.models.architecture import HIDDEN, Model
from dsee_jax.runtime import multihost
from dsee_jax.runtime.mesh import AXES, device_mesh

ROWS = ("data", "fsdp")
"""The mesh axes that shard the rows of a batch."""

RULES: tuple[tuple[str, str | None], ...] = (
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("vocab", None),
)
"""(logical axis, mesh axis): for a logical axis the first mesh axis that divides it evenly; None = not sharded."""

_SECTIONS = ("params", "masks", "deltas", "supports", "coefficients")
_FREE = PartitionSpec.UNCONSTRAINED


class Placement(NamedTuple):
    """A mesh, and the sharding of the params of one model."""

    mesh: Mesh
    specs: Mapping[str, PartitionSpec]  # by path

    def sharding(self, path: str) -> NamedSharding:
        """Return the sharding of the param at ``path``."""
        return NamedSharding(self.mesh, self.specs[path])


def mesh(config: MeshConfig, *, batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of ``devices`` (default: all devices) with the axes `AXES`; the size of an axis of -1 is inferred.

    Raises:
      InputError: the product of the sizes is not the number of devices, or ``data x fsdp`` does not divide ``batch_size``.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: getattr(config, name) for name in AXES}
    open_axes = [name for name, size in sizes.items() if size == -1]
    product = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % product or (not open_axes and product != len(devices)):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(
            f"the mesh {shape} does not fit {len(devices)} devices: its sizes must multiply to {len(devices)}, or to a "
            "divisor of that with one of them -1"
        )
    for name in open_axes:
        sizes[name] = len(devices) // product
    rows = sizes["data"] * sizes["fsdp"]
    if batch_size % rows:
        raise InputError(
            f"train.batch_size is {batch_size}; it must be a multiple of mesh.data x mesh.fsdp = {sizes['data']} x "
            f"{sizes['fsdp']} = {rows}"
        )
    return device_mesh((sizes["data"], sizes["fsdp"], sizes["tensor"]), devices)


def placement(where: Mesh, model: Model, *, cut: bool = False) -> Placement:
    """Return the sharding of a model's params on a mesh.

    Args:
      where: the mesh.
      model: its config has the widths of all layers.
      cut: the model is structurally pruned, although its config may not tell. Heads and neurons that ``tensor`` does not
        divide evenly are then replicated, and so is a width that ``fsdp`` does not.

    Raises:
      InputError: a mesh axis does not divide the axis of a param; the message lists the sizes that do.
    """
    config, tensor = model.config, where.shape["tensor"]
    # A device has complete heads and neurons.
    uneven = [
        (kind, layer, width)
        for kind, widths in config.widths.items()
        for layer, width in enumerate(widths)
        if width % tensor
    ]
    if uneven and not cut and not hf_config.kept_kinds(config):
        kind, layer, width = uneven[0]
        raise InputError(
            f"mesh.tensor is {tensor}; layer {layer} has {width} {kind}, which it does not divide: {_divisors(width)}"
        )
    axes = models.logical_axes(model)
    replicated = {"heads", "mlp"} if uneven else set()
    if (cut or config.own_width) and config.hidden_size % where.shape["fsdp"]:
        replicated.add(HIDDEN)
    specs = {}
    for path, leaf in tree.flatten(models.shapes(model)).items():
        names = axes[path]
        # An all-gather of a vector costs more than its replication.
        excluded = replicated | ({HIDDEN} if len(names) == 1 else set())
        stacked = (None,) * (leaf.ndim - len(names))
        sharded = [None if name in excluded else name for name in (*stacked, *names)]
        specs[path] = _spec(path, sharded, leaf.shape, where)
    return Placement(where, specs)


def _spec(path: str, names: Sequence[str | None], shape: Sequence[int], where: Mesh) -> PartitionSpec:
    axes: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        options = [axis for logical, axis in RULES if logical == name] if name else [None]
        fitting = [axis for axis in options if axis is None or size % where.shape[axis] == 0]
        if not fitting:
            raise InputError(
                f"mesh.{options[0]} is {where.shape[options[0]]}; the axis {name!r} of {path!r} has {size} entries, which it "
                f"does not divide: {_divisors(size)}"
            )
        axes.append(fitting[0] if fitting[0] not in axes else None)
    return PartitionSpec(*(axis if axis and where.shape[axis] > 1 else None for axis in axes))


def _divisors(size: int) -> str:
    numbers = [str(number) for number in range(1, min(size, 512) + 1) if size % number == 0]
    return f"use {', '.join(numbers[:-1])} or {numbers[-1]}" if numbers[1:] else "use 1"


def shardings(placed: Placement, values: Any) -> Any:
    """Return the sharding of every leaf, in a tree of the structure of ``values``.

    ``values`` is any tree of this library, for instance a state with optimiser moments. Leaves below ``params``, ``masks`` and
    ``deltas`` are sharded like the params of the same paths; all other leaves are replicated.
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
    """Return ``values`` on the mesh, with `shardings`; host arrays must be equal on every process."""
    where = shardings(placed, values)
    if not multihost.is_distributed():
        return jax.device_put(values, where)

    def one(leaf: Any, to: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, to)
        # jax.device_put would first all-gather the array to compare the processes.
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, to, lambda part: leaf[part])

    return jax.tree.map(one, values, where)


def split(where: Mesh, batch: Any) -> Any:
    """Return a batch on the mesh, its leading axis sharded over `ROWS`; each process transfers the rows of its own devices."""
    rows = NamedSharding(where, PartitionSpec(ROWS))
    if rows.is_fully_addressable:
        return jax.device_put(batch, rows)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda part, x=x: x[part]), batch)


@contextlib.contextmanager
def constrain_rows(where: Mesh) -> Iterator[None]:
    """While a model is traced, constrain the outputs (rows, length, width) of its modules to sharded rows.

    Otherwise the compiler may all-gather the rows instead of the weights, where its cost model prefers that.
    """
    count = where.shape["data"] * where.shape["fsdp"]
    if count == 1:
        yield
        return

    def constrain_output(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        return jax.tree.map(constrain, output) if context.method_name == "__call__" else output

    def constrain(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.ndim != 3 or x.shape[0] % count:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(where, PartitionSpec(ROWS, _FREE, _FREE)))

    with intercepted(constrain_output):
        yield
