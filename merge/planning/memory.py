"""Accelerator memory of a merge in memory: the plan's program, compiled for a topology you do not have.

Every tensor of every model is sharded over all devices, along the longest axis whose size the number of devices divides; a
tensor without such an axis is replicated. A streamed merge (`merge.streaming`) needs little memory: a few tiles at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsee_jax.ckpt.tensors import DTYPES
from dsee_jax.plan import roofline
from dsee_jax.runtime.mesh import AXES, device_mesh
from merge.leaf import Whole
from merge.methods import find
from merge.planning.plan import Job, Plan


def program(plan: Plan) -> Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]:
    """Return ``run(origin, others)``, which returns the merged tensors by name, in the written types.

    ``origin`` holds one input of every tensor: the base's tensor, the copied tensor, or for a method without a base the first
    model's. ``others`` holds ``{"models": (...), "statistics": (...)}`` for every merged tensor: its remaining inputs.
    """
    merged = [job for job in plan.jobs if job.method != "copy"]
    method = find(merged[0].method, merged[0].options) if merged else None

    def run(origin: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, jax.Array]:
        result = {job.name: origin[job.name].astype(DTYPES[job.dtype]) for job in plan.jobs if job.method == "copy"}
        if method is None:
            return result
        leaves = [_leaf(job, origin[job.name], others[job.name], method.statistics) for job in merged]
        options = [method.keywords(job.options) for job in merged]
        extras: list[dict[str, Any]] = method.prepare(leaves, options) if method.prepare else [{} for _ in merged]
        for job, leaf, keywords, extra in zip(merged, leaves, options, extras, strict=True):
            grams = {}
            if method.statistics == "grams" and job.statistics:
                grams = {"grams": list(others[job.name]["statistics"])}
            merged_tensor = method.merge(leaf, **keywords, **extra, **grams)
            result[job.name] = jnp.asarray(merged_tensor).reshape(job.shape).astype(DTYPES[job.dtype])
        return result

    return run


def _leaf(job: Job, origin: Any, others: Mapping[str, Any], kind: str) -> Whole:
    base, models = (origin, others["models"]) if job.base else (None, (origin, *others["models"]))
    arrays = [value if value.ndim else value.reshape(1) for value in (models if base is None else (base, *models))]
    statistics = tuple(others["statistics"]) if kind == "elements" else ()
    return Whole(job.name, None if base is None else arrays[0], tuple(arrays[base is not None :]), statistics)


def arguments(plan: Plan, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `program` as shapes with shardings."""

    def shaped(lazy: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(lazy.shape)
        return jax.ShapeDtypeStruct(
            shape, DTYPES[lazy.dtype], sharding=NamedSharding(mesh, _partition_spec(shape, mesh.size))
        )

    origin, others = {}, {}
    for job in plan.jobs:
        first, *rest = job.inputs
        origin[job.name] = shaped(first)
        if job.method != "copy":
            others[job.name] = {"models": tuple(map(shaped, rest)), "statistics": tuple(map(shaped, job.statistics))}
    return origin, others


def _partition_spec(shape: tuple[int, ...], count: int) -> PartitionSpec:
    divisible = [axis for axis, size in enumerate(shape) if size % count == 0]
    if not divisible:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXES if axis == longest else None for axis in range(len(shape))))


def analyze(plan: Plan, topology: str = "") -> dict[str, Any]:
    """Compile the merge for a topology, and return its memory, FLOPs and times, as `dsee_jax.plan.roofline.analyze` does.

    Raises:
      InputError: the topology does not exist, from `dsee_jax.plan.roofline.devices`.
    """
    devices = roofline.devices(topology)
    mesh = device_mesh((1, len(devices), 1), devices)
    chip = roofline.CHIPS.get(topology.partition(":")[0])
    # The origin's buffers are donated to the merged tensors.
    figures = roofline.analyze(program(plan), arguments(plan, mesh), mesh, chip, donated=(0,))
    about = {"topology": topology or f"{len(devices)} x {devices[0].device_kind}", "devices": len(devices)}
    return about | {"memory": chip.memory if chip else None, "mesh": dict(mesh.shape)} | figures
