"""Hugging Face folders in and out: ``config.json``, safetensors, tokenizer files.

Every tensor of a file is accounted for by the tables of its architecture: one left over, one missing or one of another shape
is an error. Only a missing task head is created, and said on the logger ``dsee_jax.ckpt.hf``.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import hf_layout, models, stacks, tree
from dsee_jax.ckpt import kept_units, tensors
from dsee_jax.ckpt.folders import read_json
from dsee_jax.ckpt.hf_names import Place, places_of, stored_as, tables_of
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.prune import compaction
from dsee_jax.typing import Key

log = logging.getLogger(__name__)


Sharding: TypeAlias = Callable[[str], jax.sharding.Sharding]
"""Path of a param -> where it lies."""


def _model(folder: Path, task: str, num_labels: int, dtype: str) -> nn.Module:
    config = read_json(folder / "config.json")
    try:
        module = models.find(config.get("model_type", ""))
        if task not in module.ARCHITECTURES:
            options = module.ARCHITECTURES
            raise InputError(
                f"task {task!r} is not supported{did_you_mean(task, options)}; supported: {', '.join(options)}"
            )
        if task == "question-answering" and num_labels != 2:
            raise InputError(f"num_labels is {num_labels}; {task} has 2, where an answer starts and where it ends")
        return module.Model(module.Config.from_hf(config, num_labels=num_labels, dtype=dtype), task)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def abstract_model(
    path: str | Path,
    task: str = "sequence-classification",
    num_labels: int = 2,
    *,
    dtype: str = "float32",
    scan: bool = False,
    remat: bool = False,
) -> Any:
    """Return the model that `load_pretrained` would, from ``config.json`` alone; raises `InputError` as it does."""
    folder = resolve(path, weights=False)
    model = _model(folder, task, num_labels, dtype)
    _groups(folder, model, scan, remat)
    options: dict[str, Any] = {name: True for name, asked in (("scan", scan), ("remat", remat)) if asked}
    return model.clone(**options)


def load_pretrained(
    path: str | Path,
    task: str = "sequence-classification",
    num_labels: int = 2,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    scan: bool = False,
    remat: bool = False,
    new_head: bool = False,
    sharding: Callable[[Any], Sharding] | None = None,
    key: Key | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a model.

    Arrays are read one by one, the largest first, each cast and put where it belongs before the next, so that memory peaks
    little above the size of the weights.

    Args:
      path: what `resolve` takes.
      task: sequence-classification, token-classification, question-answering or features (the last hidden state, no head).
      num_labels: columns of the classifier; 1 for regression, 2 for question-answering.
      dtype: float32 or bfloat16, of the matrix products.
      param_dtype: float32 or bfloat16, of the params, whatever the file holds.
      scan: of decoders: run the layers by ``jax.lax.scan``; their params come stacked (`dsee_jax.stacks`).
      remat: of decoders: compute what is inside a layer again in the backward pass.
      new_head: create what gives the labels at random though the file has it: its model was tuned on another task. What a head
        has below that, as the pooler of BERT, is read.
      sharding: of the model, before a param is read: ``model -> (path -> where it lies)``; None: on the default device.
      key: for a head that the checkpoint lacks, normal with the config's initializer_range (0.02), biases 0; None:
        ``jax.random.key(0)``.

    Returns:
      ``(model, params)``: a Linen module, and nested dicts with kernels (in, out), stacked ones (layers, in, out).

    Raises:
      InputError: anything missing, unreadable, not implemented, left over or of another shape; one line that names it.
    """
    folder = resolve(path)
    model: Any = _model(folder, task, num_labels, dtype)
    try:
        compaction.check(model, kept_units.read(folder))
    except InputError as error:
        raise InputError(f"{folder / kept_units.KEPT}: {error}: it and config.json must be written together") from None
    places, stored = places_of(model), tensors.index(folder)
    found = _account(folder, model, places, stored, _labelled(folder, model) if new_head else set())
    groups, kind = _groups(folder, model, scan, remat), _param_dtype(param_dtype)
    options = {name: True for name, asked in (("scan", scan), ("remat", remat)) if asked}
    where = None if sharding is None else sharding(model.clone(**options))
    flat = {path: _put(path, array, where) for path, array in _arrays(found, places, groups, kind)}
    shapes = {path: leaf.shape for path, leaf in tree.flatten(models.shapes(model)).items()}
    created = [path for stacked, members in groups.items() for path in members if stacked not in flat]
    if created:
        said = "the head of another task is left in %s, %s" if new_head else "%s has no %s"
        log.warning(f"{said}: created at random", folder, ", ".join(created))
    for number, path in enumerate(created):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0) if key is None else key, number), shapes[path])
        value = jnp.zeros(shapes[path]) if path.endswith("bias") else model.config.initializer_range * noise
        flat[path] = _put(path, np.asarray(value.astype(kind)), where)
    return model.clone(**options), tree.unflatten({path: flat[path] for path in groups})


def _arrays(
    found: Mapping[str, tensors.Stored],
    places: Mapping[str, Place],
    groups: Mapping[str, Sequence[str]],
    kind: np.dtype[Any],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the params that files hold, stacked ones once their last layer is read.

    The largest first: the second copy of an array being converted then never stands on top of all the others.
    """
    stacked = {path: group for group, members in groups.items() for path in members}

    def order(name: str) -> tuple[int, str]:
        mine = [stacked[path] for path in places[name].params]
        return -found[name].nbytes * max(len(groups[group]) for group in mine), min(mine)

    filling: dict[str, tuple[np.ndarray, set[str]]] = {}
    for name in sorted(found, key=order):
        array = tensors.read(found[name])
        for path, layout in places[name].params.items():
            value, group = hf_layout.to_ours(layout, array).astype(kind, copy=False), stacked[path]
            members = groups[group]
            if group == path:
                yield path, value
                continue
            if group not in filling:
                filling[group] = np.empty((len(members), *value.shape), kind), set(members)
            whole, left = filling[group]
            whole[members.index(path)] = value
            left.remove(path)
            if not left:
                yield group, filling.pop(group)[0]


def _put(path: str, array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """Put an array where it belongs; each process touches its own part only."""
    if sharding is None:
        placed = jnp.asarray(array)
    else:
        placed = jax.make_array_from_callback(array.shape, sharding(path), lambda part: array[part])
    # Ready before the next is read: a device that lags behind would hold the arrays of the file as well.
    return jax.block_until_ready(placed)


def _param_dtype(name: str) -> np.dtype[Any]:
    if name not in ("float32", "bfloat16"):
        raise InputError(f"param_dtype is {name!r}; use float32 or bfloat16")
    return jnp.dtype(name)


def _groups(folder: Path, model: Any, scan: bool, remat: bool) -> dict[str, list[str]]:
    """Return ``{path of a param: paths of its layers}``, in the order of the tree; itself where it is not stacked."""
    for name, asked, done in (("scan", scan, "scanned"), ("remat", remat, "computed again")):
        if asked and not hasattr(model, name):
            raise InputError(
                f"{folder / 'config.json'}: layers of {model.config.model_type!r} cannot be {done}, those of decoders can: "
                f"{name}=False"
            )
    flat = tree.flatten(models.shapes(model))
    if not scan:
        return {path: [path] for path in flat}
    if model.config.uneven:
        raise InputError(
            f"{folder / 'config.json'}: layers that differ ({model.config.uneven}) cannot be scanned: use scan=False"
        )
    members = stacks.groups(flat)
    return {path: members[path] for path in tree.flatten(models.shapes(model.clone(scan=True)))}


def _labelled(folder: Path, model: Any) -> set[str]:
    """Return the HF names of what gives the labels: the params whose shape their number decides."""
    more = model.clone(config=dataclasses.replace(model.config, num_labels=model.config.num_labels + 1))
    shapes, others = (tree.flatten(models.shapes(one)) for one in (model, more))
    found = {stored_as(tables_of(model), path)[0] for path, leaf in shapes.items() if leaf.shape != others[path].shape}
    if not found:
        raise InputError(f"{folder}: new_head is true; a model for {model.task} gives no labels: leave it out")
    return found


def _account(
    folder: Path, model: Any, places: Mapping[str, Place], stored: Mapping[str, tensors.Stored], unread: Container[str]
) -> dict[str, tensors.Stored]:
    """Return ``{HF name: where}`` of the params the file has, but for those ``unread``; anything not explained is an error."""
    tables = tables_of(model)
    head = {theirs for ours, theirs, _ in tables.HF_NAMES if _any(tables.HEAD, ours)}
    found: dict[str, tensors.Stored] = {}
    left, ignored = [], []
    for name, where in stored.items():
        known = name
        for pattern, replacement in tables.OLD_NAMES:
            known = re.sub(f"^{pattern}$", replacement, known)
        if tables.PREFIX + known in places or tables.PREFIX + known in head:
            known = tables.PREFIX + known
        if known in found:
            raise InputError(f"{where.file} holds {known!r} twice, under an old name or without {tables.PREFIX!r} too")
        if known in places and known not in unread:
            found[known] = where
        elif known in head or _any(tables.IGNORED_NAMES, name):
            ignored.append(name)
        else:
            left.append(name)
    missing = [name for name, place in places.items() if name not in found]
    there = [path for name in found for path in places[name].params]
    lacking = [name for name in missing if not all(_creatable(tables, path, there) for path in places[name].params)]
    if left or lacking:
        parts = (
            [f"tensors that this {model.config.model_type} has no place for ({len(left)}): {_few(left)}"]
            if left
            else []
        )
        parts += [f"tensors missing ({len(lacking)}): {_few(lacking)}"] if lacking else []
        near = did_you_mean(left[0], lacking or places) if left else ""
        raise InputError(f"{folder}: {'; '.join(parts)}{near}; config.json and the weights must be of one model")
    if ignored:
        log.info("%s: not used: %s", folder, _few(ignored))
    for name, where in found.items():
        if where.shape != places[name].shape:
            raise InputError(_misshapen(folder, model, name, where, places[name]))
    return found


def _creatable(tables: ModuleType, path: str, there: Iterable[str]) -> bool:
    """Say whether ``path`` belongs to a head of which the file, which has the paths ``there``, has nothing at all."""
    parent = path.rpartition("/")[0]
    return _any(tables.HEAD, path) and not any(other.startswith(f"{parent}/") for other in there)


def _misshapen(folder: Path, model: Any, name: str, where: tensors.Stored, place: Place) -> str:
    hint = ""
    if "embeddings/word/embedding" in place.params:
        hint = f" (vocab_size is {model.config.vocab_size}, the file has {where.shape[:1][0]} rows)"
    cut = {path for layers in models.cuts(model).values() for units in layers for path in units.axes}
    if cut & place.params.keys() and all(
        found <= asked for found, asked in zip(where.shape, place.shape, strict=False)
    ):
        hint = " (were heads or neurons cut? then take the config.json that was written with these weights)"
    head = any(_any(tables_of(model).HEAD, path) for path in place.params)
    if head and model.task != "question-answering" and where.shape[1:] == place.shape[1:]:
        labels = f"num_labels is {model.config.num_labels}, the file has {where.shape[:1][0]} labels"
        hint = f" ({labels}: pass num_labels, or new_head where they are of another task)"
    return f"{where.file}: {name!r} has shape {where.shape}; {folder / 'config.json'} asks for {place.shape}{hint}"


def _any(patterns: Iterable[str], text: str) -> bool:
    return any(re.fullmatch(pattern, text) for pattern in patterns)


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
