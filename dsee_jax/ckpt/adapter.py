"""The adapter of a run: what was trained, where it lives, and what was cut, in one small folder.

::

    adapter_config.json   scale, scale_sparse, the delta section of the config, task, labels, SHA-256 of the base
    adapter.safetensors   deltas/<kernel path>/{a, b, values}, supports/<kernel path>, params/<path> (the task head)
    masks.safetensors     one bit a weight, where the run pruned
    kept.safetensors      one bit a head and a neuron, where the model was cut

The pretrained model, its masks, the head and the updates together are the tuned model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dsee_jax import tree
from dsee_jax.ckpt import kept_units, packed_masks
from dsee_jax.errors import InputError
from dsee_jax.typing import Deltas, Masks, Params, Supports

CONFIG, WEIGHTS, MASKS = "adapter_config.json", "adapter.safetensors", "masks.safetensors"


class Adapter(NamedTuple):
    """An adapter in memory."""

    deltas: Deltas
    supports: Supports
    params: Params  # the task head
    masks: Masks  # True = kept; empty where nothing was pruned
    config: dict[str, Any]
    kept: Masks  # the heads and neurons of the model it is for; empty where none were cut


def save(folder: Path, adapter: Adapter) -> None:
    """Write an adapter into an existing folder."""
    parts = {"deltas": adapter.deltas, "supports": adapter.supports, "params": adapter.params}
    # safetensors writes the memory of a strided view as it lies, in the wrong order.
    flat = {path: np.ascontiguousarray(leaf) for path, leaf in tree.flatten(parts).items()}
    save_file(flat, folder / WEIGHTS)
    if adapter.masks:
        packed_masks.save(folder / MASKS, adapter.masks)
    kept_units.write(folder, adapter.kept)
    (folder / CONFIG).write_text(json.dumps(adapter.config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Adapter:
    """Read an adapter.

    Raises:
      InputError: the folder or one of its files is missing or damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        parts = tree.unflatten(load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename or folder / WEIGHTS}: missing; an adapter is {CONFIG} and {WEIGHTS}"
        ) from None
    except (ValueError, AttributeError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged adapter: {error}") from None
    masks = packed_masks.load(folder / MASKS) if (folder / MASKS).exists() else {}
    deltas, supports, params = (parts.get(name, {}) for name in ("deltas", "supports", "params"))
    return Adapter(deltas, supports, params, masks, config, kept_units.read(folder))


def check(folder: Path, model: Path, params: Params, kept: Adapter) -> None:
    """Raise `InputError` where the adapter of ``folder`` is of another base than the ``params`` of ``model``.

    Or of another cut of it, which may have the same shapes.
    """
    # An adapter that says its widths alone is told by its shapes.
    where = (
        None if "kept" in kept.config and not kept.kept else kept_units.difference(kept_units.read(model), kept.kept)
    )
    if where:
        raise InputError(f"{folder} and {model} are of two cuts: {where} differ; both must be of one run")
    flat, coordinates, deltas = (tree.flatten(one) for one in (params, kept.supports, kept.deltas))
    for path in dict.fromkeys(part.rpartition("/")[0] for part in deltas):
        shape = flat[path].shape[-2:] if path in flat else ()
        a, b = (deltas.get(f"{path}/{part}") for part in "ab")
        fits = bool(shape) and (a is None or b is None or (a.shape[-2], b.shape[-1]) == shape)
        if not fits or (path in coordinates and (coordinates[path] >= shape).any()):
            raise InputError(
                f"{folder}: the update of {path!r} does not fit {model}, which has {shape or 'none'} there: "
                "they are of two models, or of two cuts of one"
            )


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 (hex) over the safetensors files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
