"""The adapter in a folder, of this library or of PEFT, for a loaded model."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import masks, stacks, tree
from dsee_jax.ckpt import adapter, formats, peft, peft_paths
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas.adapter import Adapter, kernels
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model, scans
from dsee_jax.typing import Array, Params


def read(folder: Path, model: Model, base: str) -> adapter.Saved:
    """Return the adapter in a folder, with stacked layers for a model that scans.

    Args:
      folder: holds an adapter of this library, or one of PEFT of a type in `dsee_jax.ckpt.peft.SUPPORTED`.
      model: the base.
      base: its name, for messages.

    Raises:
      InputError: no adapter, a damaged or unsupported one, one of PEFT that belongs to another base, or updates of some layers
        only for a model that scans.
    """
    saved = peft_paths.to_saved(peft.read(folder), model, base) if formats.is_peft(folder) else adapter.load(folder)
    if not scans(model):
        return saved
    deltas, depth = stacks.stack(_equal_ranks(saved.deltas)), len(next(iter(model.config.widths.values())))
    for stacked, leaf in tree.flatten(deltas).items():
        if stacks.is_stacked(stacked) and len(leaf) != depth:
            raise InputError(
                f"{folder}: {stacked!r} has updates of {len(leaf)} of the {depth} layers: such layers cannot be scanned, "
                "set model.scan to false"
            )
    return saved._replace(
        deltas=deltas,
        supports=stacks.stack(saved.supports),
        params=stacks.stack(saved.params),
        masks=stacks.stack(saved.masks),
    )


def _equal_ranks(deltas: Any) -> dict[str, Any]:
    """Return updates whose layers have the rank of the largest, by zeros: stacked layers have one shape."""
    flat = tree.flatten(deltas)
    ranks: dict[str, int] = {}
    for path, leaf in flat.items():
        if path.endswith("/a"):
            stacked = stacks.place(path)[0].removesuffix("/a")
            ranks[stacked] = max(ranks.get(stacked, 0), leaf.shape[1])
    for path, leaf in flat.items():
        axis = {"a": 1, "b": 0}.get(path.rpartition("/")[2])
        if axis is not None:
            wanted = ranks[stacks.place(path)[0].rpartition("/")[0]]
            pads = [(0, wanted - leaf.shape[axis] if each == axis else 0) for each in range(2)]
            flat[path] = np.pad(leaf, pads)
    return tree.unflatten(flat)


def load_adapter(path: str | Path, model: Model, params: Params) -> tuple[Params, Adapter]:
    """Return the params of a model with the trained head of an adapter, and the updates of the adapter.

    ::

        params, adapter = dsee_jax.load_adapter("lora", model, params)
        logits = dsee_jax.apply(model, params, adapter, batch)
        plain = dsee_jax.materialize(params, adapter)

    Args:
      path: the folder of an adapter of this library or of PEFT, in a store too, or a hub id. The masks of an adapter of this
        library are applied to the params.
      model: the base, as from `dsee_jax.load_pretrained`, with the task and the number of labels of the adapter.
      params: its params.

    Raises:
      InputError: no adapter, a damaged or unsupported one, or one that does not fit the model.
    """
    params, saved = attached(resolve(path), model, params, f"the {model.config.model_type} model")
    return params, saved.adapter


def attached(folder: Path, model: Model, params: Params, base: str) -> tuple[Params, adapter.Saved]:
    """Return the params of a model with the head and the masks of the adapter in ``folder``, and the adapter.

    ``base`` names the model in messages. Raises `InputError` like `load_adapter`.
    """
    saved = read(folder, model, base)
    adapter.check_shapes(folder, base, params, saved)
    _check_changed(folder, base, params, saved)
    params = with_params(params, saved, folder)
    return masks.apply(params, saved.masks) if saved.masks else params, saved


def _check_changed(folder: Path, base: str, params: Params, saved: adapter.Saved) -> None:
    """Raise `InputError` for the adapter of a run that changed the weights that stay, on other weights than ``model/``."""
    if adapter.MODEL_SHA256 not in saved.config or adapter.BASE_SHA256 in saved.config:
        return
    flat = tree.flatten(params)
    for path, mask in tree.flatten(saved.masks).items():
        # The model of the run is pruned already.
        if jnp.any(jnp.where(mask, 0, flat[path]) != 0):
            raise InputError(
                f"{folder}: the pruning of its run changed the weights that stay, so the adapter fits model/ of the run and "
                f"no other: {base} has weights at {path!r} where the run has zeros"
            )


def with_params(params: Params, saved: adapter.Saved, folder: Path) -> Params:
    """Return ``params`` with the values that an adapter has for some of them, such as its head; raises `InputError`."""
    flat = tree.flatten(params)
    for path, value in tree.flatten(saved.params).items():
        if path not in flat or flat[path].shape != value.shape:
            there = flat[path].shape if path in flat else "none"
            raise InputError(
                f"{folder}: the adapter has {path!r} {value.shape}, and the model {there}: give the task and the number of "
                "labels of the adapter"
            )
        flat[path] = _placed(value, flat[path])
    return tree.unflatten(flat)


def _placed(value: np.ndarray, like: Array) -> Array:
    """Return an array of the type and on the devices of another."""
    value = value.astype(like.dtype)
    if not isinstance(like, jax.Array):
        return value
    return jax.make_array_from_callback(value.shape, like.sharding, lambda part: value[part])


def described(delta: DeltaConfig, saved: adapter.Saved) -> DeltaConfig:
    """Return the section ``delta`` of a config with the targets, the largest rank, the scale and the values of an adapter.

    It is ``delta`` as it is for an adapter without updates.
    """
    updates, scale = kernels(saved.deltas), float(saved.config["scale"])
    if not updates:
        return delta
    rank = max((update["a"].shape[-1] for update in updates.values() if "a" in update), default=0)
    nonzeros = max((update["values"].shape[-1] for update in updates.values() if "values" in update), default=0)
    return dataclasses.replace(
        delta,
        targets=tuple(map(re.escape, updates)),
        rank=rank,
        budget=0.0,  # the rank stands
        alpha=scale * (rank or 1),
        nonzeros=nonzeros,
        scale_sparse=saved.config["scale_sparse"],
    )
