"""The adapter of a run: updates, supports, task head, masks and kept units, in one small folder.

::

    adapter_config.json   scale, scale_sparse, the delta section of the config, task, labels, SHA-256 of the base and of model/
    adapter.safetensors   deltas/<kernel path>/{a, b, values}, supports/<kernel path>, params/<path> (of the task head)
    masks.safetensors     one bit per weight, if the run pruned weights
    kept.safetensors      one bit per head and neuron, if the model was structurally pruned

The pretrained model, the masks, the head and the updates together are the tuned model.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dsee_jax import tree
from dsee_jax.ckpt import formats, kept_units, packed_masks, tensors
from dsee_jax.ckpt.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, MASKS, MODEL, SINGLE
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError
from dsee_jax.runtime import files
from dsee_jax.runtime.storage import Place
from dsee_jax.typing import Deltas, Masks, Params, Supports

BASE_SHA256, MODEL_SHA256 = "base_sha256", "model_sha256"
"""In adapter_config.json: the `fingerprint` of the pretrained model, and that of the run's own ``model/``."""


class Saved(NamedTuple):
    """The content of an adapter folder in memory."""

    deltas: Deltas  # empty if a cut removed them all
    supports: Supports
    params: Params  # the trained part of the task head; old adapters have all of it
    masks: Masks  # True = kept; empty if no weight was pruned
    config: dict[str, Any]
    kept: Masks  # True = kept: the units of its model; empty if none were pruned

    @property
    def adapter(self) -> Adapter:
        """The updates, for `dsee_jax.apply` and the functions beside it."""
        return Adapter(self.deltas, self.supports, self.config["scale"], self.config["scale_sparse"])


def save(folder: Path, saved: Saved) -> None:
    """Write an adapter into an existing folder."""
    parts = {"deltas": saved.deltas, "supports": saved.supports, "params": saved.params}
    tensors.save(folder / ADAPTER_WEIGHTS, tree.flatten(parts))
    if saved.masks:
        packed_masks.save(folder / MASKS, saved.masks)
    kept_units.write(folder, saved.kept)
    (folder / ADAPTER_CONFIG).write_text(files.dumps(saved.config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> Saved:
    """Read an adapter.

    Raises:
      InputError: the folder or one of its files is missing or damaged: an update lacks a part, or a number is not finite.
    """
    if folder.is_dir() and not (folder / ADAPTER_WEIGHTS).exists() and formats.is_peft(folder):
        raise InputError(f"{formats.describe(folder)}; expected the adapter/ folder of a run")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        parts = tree.unflatten(load_file(folder / ADAPTER_WEIGHTS))
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename or folder / ADAPTER_WEIGHTS}: missing; an adapter is {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        ) from None
    except (ValueError, AttributeError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged adapter: {error}") from None
    masks = packed_masks.load(folder / MASKS) if (folder / MASKS).exists() else {}
    deltas, supports, params = (parts.get(name, {}) for name in ("deltas", "supports", "params"))
    saved = Saved(deltas, supports, params, masks, config, kept_units.read(folder))
    if damage := _damage(saved):
        raise InputError(f"{folder}: damaged adapter: {damage}; save it again, or copy it again from its source")
    return saved


def _damage(saved: Saved) -> str | None:
    """Return the first thing in an adapter that `save` writes otherwise."""
    config = saved.config
    if not isinstance(config, dict):
        return f"{ADAPTER_CONFIG} holds a {type(config).__name__}, expected an object"
    scale = config.get("scale")
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not 0 < scale <= float(np.finfo(np.float32).max)
    ):
        return f"scale is {scale!r} in {ADAPTER_CONFIG}, expected a number above 0"
    if not isinstance(config.get("scale_sparse"), bool):
        return f"scale_sparse is {config.get('scale_sparse')!r} in {ADAPTER_CONFIG}, expected true or false"
    updates: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in tree.flatten(saved.deltas).items():
        kernel, _, part = path.rpartition("/")
        updates.setdefault(kernel, {})[part] = leaf
    supports = tree.flatten(saved.supports)
    if not updates and not saved.kept and "kept" not in config:  # this run, or one before it, may have cut all updates
        return f"{ADAPTER_WEIGHTS} holds no updates"
    for kernel in updates.keys() | supports.keys():
        if not _whole(updates.get(kernel, {}), supports.get(kernel)):
            return f"the update of {kernel!r} is incomplete, expected a (in, rank) and b (rank, out), values and coordinates"
    for path, leaf in tree.flatten({"deltas": saved.deltas, "params": saved.params}).items():
        if not np.issubdtype(leaf.dtype, np.number) or not np.isfinite(leaf).all():
            return f"{path!r} holds numbers that are not finite"
    return None


def _whole(update: Mapping[str, np.ndarray], support: np.ndarray | None) -> bool:
    """Return whether the parts of the update of a kernel belong to each other."""
    shapes = {part: leaf.shape for part, leaf in update.items()}
    low, values = {part: shape for part, shape in shapes.items() if part != "values"}, shapes.get("values")
    if low and not (low.keys() == {"a", "b"} and len(low["a"]) == len(low["b"]) == 2 and low["a"][1] == low["b"][0]):
        return False
    if support is None:
        return values is None and bool(low)
    return values == support.shape[:1] and support.shape[1:] == (2,) and bool((support >= 0).all())


def check(folder: Path, model: Path, params: Params, saved: Saved) -> None:
    """Raise `InputError` unless the adapter ``saved`` in ``folder`` fits the ``params`` of ``model``.

    The units must be the same ones: other units may have the same shapes.
    """
    # Old adapters hold the widths only; their shapes are compared below.
    difference = (
        None if "kept" in saved.config and not saved.kept else kept_units.difference(kept_units.read(model), saved.kept)
    )
    if difference:
        raise InputError(f"{folder} and {model} were pruned differently: {difference} differ; both must be of one run")
    check_shapes(folder, model, params, saved)


def check_shapes(folder: Path, model: Path | str, params: Params, saved: Saved) -> None:
    """Raise `InputError` unless the updates of ``saved`` fit their kernels in ``params``; messages name ``model``."""
    flat, coordinates, deltas = (tree.flatten(one) for one in (params, saved.supports, saved.deltas))
    for path in dict.fromkeys(part.rpartition("/")[0] for part in deltas):
        shape = flat[path].shape[-2:] if path in flat else ()
        a, b = (deltas.get(f"{path}/{part}") for part in "ab")
        fits = bool(shape) and (a is None or b is None or (a.shape[-2], b.shape[-1]) == shape)
        if not fits or (path in coordinates and (coordinates[path] >= shape).any()):
            raise InputError(
                f"{folder}: the update of {path!r} is {_sizes(a, b, coordinates.get(path))} and does not fit {model}, which "
                f"has {shape or 'none'} there: "
                "the adapter belongs to another model, or to the same model pruned differently"
            )


def _sizes(a: np.ndarray | None, b: np.ndarray | None, support: np.ndarray | None) -> str:
    """Return the size of the kernel of an update, as far as its arrays tell it."""
    if a is not None and b is not None:
        return f"{(a.shape[-2], b.shape[-1])}"
    return "empty" if support is None else f"{tuple((support.reshape(-1, 2).max(0) + 1).tolist())} or larger"


def check_base(folder: Path, config: Mapping[str, Any], model: Path | str, sha256: str, *, allow: str) -> None:
    """Raise `InputError` if the adapter in ``folder`` was trained on other weights than those of ``model``.

    An adapter belongs to two models: to the pretrained model that it was trained on, with the adapter's masks, and to the
    ``model/`` of its run, which has the masks already. An adapter that records neither fits every model.

    Args:
      folder: of the adapter.
      config: its adapter_config.json.
      model: named in the message.
      sha256: the `fingerprint` of ``model``.
      allow: the way to use the adapter all the same, for the message, such as ``--allow-changed-base``.
    """
    own = folder.absolute().parent
    if MODEL_SHA256 not in config and Path(model).absolute() in (own, own / MODEL):
        return  # an adapter of an earlier version, beside the model of its run
    recorded = [config[key] for key in (BASE_SHA256, MODEL_SHA256) if key in config]
    if recorded and sha256 not in recorded:
        raise InputError(
            f"{folder}: the adapter was trained on other weights than those of {model}: SHA-256 {str(recorded[0])[:12]} by "
            f"its {ADAPTER_CONFIG}, {sha256[:12]} there; give the model that it was trained on, or {allow}"
        )


def fingerprint(folder: Place) -> str:
    """Return the SHA-256 (hex) over the safetensors files of a model or adapter, in the order of their names.

    Files that the model does not read, such as the same weights in another layout, do not count.
    """
    digest, paths = hashlib.sha256(), set(folder.glob("*.safetensors"))
    if isinstance(folder, Path) and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        paths = {stored.file for stored in tensors.index(folder).values()}
    for path in sorted(paths):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
