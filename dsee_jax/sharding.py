"""Devices as a mesh, and where arrays lie on it: batches over ``data``, everything else on every device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsee_jax.config import MeshConfig
from dsee_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def mesh(config: MeshConfig, *, batch_size: int) -> Mesh:
    """Return the mesh of all devices, axes `AXES`.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or the batch does not divide over ``data``.
    """
    devices = np.asarray(jax.devices())
    sizes = [config.data, config.fsdp, config.tensor]
    if config.fsdp != 1 or config.tensor != 1:
        raise InputError(f"mesh is fsdp={config.fsdp}, tensor={config.tensor}; only the data axis may exceed 1 so far")
    if sizes[0] == -1:
        sizes[0] = devices.size
    if sizes[0] != devices.size:
        raise InputError(f"mesh.data is {sizes[0]}; there are {devices.size} devices: use {devices.size} or -1")
    if batch_size % sizes[0]:
        raise InputError(f"train.batch_size is {batch_size}; it must be a multiple of mesh.data = {sizes[0]}")
    return Mesh(devices.reshape(sizes), AXES)


def split(where: Mesh, batch: Any) -> Any:
    """Put a batch on the mesh, its leading axis over ``data``."""
    return jax.device_put(batch, NamedSharding(where, PartitionSpec("data")))


def copy(where: Mesh, values: Any) -> Any:
    """Put a tree on the mesh, a whole copy on every device."""
    return jax.device_put(values, NamedSharding(where, PartitionSpec()))
