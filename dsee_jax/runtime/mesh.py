"""The device mesh of a job: its axes, and devices laid along the links between them."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
"""The mesh axes, from the one with the least traffic to the one with the most."""


def device_mesh(shape: tuple[int, int, int], devices: Sequence[Any]) -> Mesh:
    """Return the mesh of ``devices`` with the axes `AXES` of the sizes ``shape``, whose product is the number of devices."""
    try:
        # If the devices have coordinates, neighbours on a mesh axis are neighbours in the network.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        # JAX does not know some topologies, for instance the links between slices.
        log.warning("the mesh %s has the devices in their own order, not along their links", shape)
        grid = np.reshape(np.array(devices, dtype=object), shape)
    return Mesh(grid, AXES)
