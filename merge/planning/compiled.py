"""What a merge in memory would take of accelerators: the real program of a plan, compiled for devices that may not be there.

Every tensor of every model is divided over all devices, along its longest axis that they divide; what none divides lies whole
on each. A merge from files to files (`merge.streaming`) needs no such memory: it holds a few tiles at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsee_jax import plan as plans
from dsee_jax import sharding
from dsee_jax.ckpt.tensors import DTYPES
from dsee_jax.config import MeshConfig
from merge.leaf import Whole
from merge.methods import find
from merge.planning.plan import Job, Plan


def program(plan: Plan) -> Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]:
    """Return ``run(origin, others)``, which gives the merged tensors by their names, in the types that are written.

    ``origin`` has of every tensor the base, or what is copied, or of a method without a base the first model; ``others`` has
    of the tensors that are merged ``{"models": (...), "statistics": (...)}``, less the first model where that is the origin.
    """
    merged = [job for job in plan.jobs if job.method != "copy"]
    method = find(merged[0].method, merged[0].options) if merged else None

    def run(origin: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, jax.Array]:
        found = {job.name: origin[job.name].astype(DTYPES[job.dtype]) for job in plan.jobs if job.method == "copy"}
        if method is None:
            return found
        leaves = [_leaf(job, origin[job.name], others[job.name], method.statistics) for job in merged]
        options = [method.keywords(job.options) for job in merged]
        extras: list[dict[str, Any]] = method.prepare(leaves, options) if method.prepare else [{} for _ in merged]
        for job, leaf, given, extra in zip(merged, leaves, options, extras, strict=True):
            grams = {}
            if method.statistics == "grams" and job.statistics:
                grams = {"grams": list(others[job.name]["statistics"])}
            made = method.merge(leaf, **given, **extra, **grams)
            found[job.name] = jnp.asarray(made).reshape(job.shape).astype(DTYPES[job.dtype])
        return found

    return run


def _leaf(job: Job, origin: Any, others: Mapping[str, Any], kind: str) -> Whole:
    base, models = (origin, others["models"]) if job.base else (None, (origin, *others["models"]))
    lined = [value if value.ndim else value.reshape(1) for value in (models if base is None else (base, *models))]
    statistics = tuple(others["statistics"]) if kind == "elements" else ()
    return Whole(job.name, None if base is None else lined[0], tuple(lined[base is not None :]), statistics)


def arguments(plan: Plan, where: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `program` as shapes with shardings."""

    def shaped(lazy: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(lazy.shape)
        return jax.ShapeDtypeStruct(
            shape, DTYPES[lazy.dtype], sharding=NamedSharding(where, _divided(shape, where.size))
        )

    origin, others = {}, {}
    for job in plan.jobs:
        first, *rest = job.inputs
        origin[job.name] = shaped(first)
        if job.method != "copy":
            others[job.name] = {"models": tuple(map(shaped, rest)), "statistics": tuple(map(shaped, job.statistics))}
    return origin, others


def _divided(shape: tuple[int, ...], count: int) -> PartitionSpec:
    fitting = [axis for axis, size in enumerate(shape) if size % count == 0]
    if not fitting:
        return PartitionSpec()
    longest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*(("data", "fsdp", "tensor") if axis == longest else None for axis in range(len(shape))))


def compiled(plan: Plan, topology: str = "") -> dict[str, Any]:
    """Compile the merge for a topology, and return what it takes, as `dsee_jax.plan.compiled` does.

    Raises:
      InputError: there is no such topology, as `dsee_jax.plan.devices` says.
    """
    devices = plans.devices(topology)
    where = sharding.mesh(MeshConfig(data=1, fsdp=len(devices), tensor=1), batch_size=len(devices), devices=devices)
    chip = plans.CHIPS.get(topology.partition(":")[0])
    # The merged tensors take the place of the origin's.
    found = plans.compiled(program(plan), arguments(plan, where), where, chip, donated=(0,))
    about = {"topology": topology or f"{len(devices)} x {devices[0].device_kind}", "devices": len(devices)}
    return about | {"memory": chip.memory if chip else None, "mesh": dict(where.shape)} | found
