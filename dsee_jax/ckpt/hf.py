"""Hugging Face folders in and out: ``config.json``, safetensors, tokenizer files.

Every tensor of a file is accounted for by the tables of its architecture: one left over, one missing or one of another shape
is an error. Only a missing task head is created, and said on the logger ``dsee_jax.ckpt.hf``.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import compaction, models, processes, stacks, tree
from dsee_jax import layout as layouts
from dsee_jax.aliases import Key, Masks, Params
from dsee_jax.ckpt import cuts, folders, tensors
from dsee_jax.ckpt.folders import GENERATION, TOKENIZER_FILES, read_json
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.layout import Layout
from dsee_jax.models import fields

log = logging.getLogger(__name__)


Sharding: TypeAlias = Callable[[str], jax.sharding.Sharding]
"""Path of a param -> where it lies."""


class _Place(NamedTuple):
    """What a tensor of a file holds."""

    params: dict[str, Layout]  # by path; several where they share the tensor
    shape: tuple[int, ...]  # in the file


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


def described(
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


def _tables(model: Any) -> ModuleType:
    return models.find(model.config.model_type)


def _places(model: Any) -> dict[str, _Place]:
    """Return ``{HF name: place}`` for every param of the model, in the order of its tree."""
    tables, places = _tables(model), {}
    for path, leaf in tree.flatten(models.shapes(model)).items():
        name, layout = _stored(tables, path)
        layout = layouts.resolved(layout, model.config)
        place = places.setdefault(name, _Place({}, layouts.stored_shape(layout, leaf.shape)))
        place.params[path] = layout
    return places


def _stored(tables: ModuleType, path: str) -> tuple[str, Layout]:
    """Return the name of the tensor that holds a param, and how it stands there; `InputError` where there is none."""
    known = {ours: (theirs, layout) for ours, theirs, layout in tables.HF_NAMES}
    number = re.search(r"(?<=_)\d+(?=/)", path)
    general = path.replace(number[0], "{i}", 1) if number else path
    if general not in known:
        raise InputError(f"{tables.Config.model_type} has no param {path!r}{did_you_mean(general, known)}")
    theirs, layout = known[general]
    return theirs.format(i=number[0] if number else ""), layout


def stands(config: Mapping[str, Any], paths: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, Layout]]:
    """Return where params of our models stand among the tensors of a file.

    Args:
      config: the file's config.json.
      paths: of params.
      names: of the file's tensors.

    Returns:
      ``{path: (name, layout)}``; a param that the file lacks, as a task head, gets Hugging Face's name.

    Raises:
      InputError: the architecture is not supported, or has no such param.
    """
    tables = models.find(str(config.get("model_type")))
    written: dict[str, str] = {}
    for name in names:
        new = name
        for pattern, replacement in tables.OLD_NAMES:
            new = re.sub(f"^{pattern}$", replacement, new)
        written |= {new: name, tables.PREFIX + new: name}
    found = {}
    for path in paths:
        name, layout = _stored(tables, path)
        if layout.block:
            layout = layouts.resolved(layout, tables.Config.from_hf(config))
        found[path] = (written.get(name, name), layout)
    return found


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
        compaction.check(model, cuts.read(folder))
    except InputError as error:
        raise InputError(f"{folder / cuts.KEPT}: {error}: it and config.json must be written together") from None
    places, stored = _places(model), tensors.index(folder)
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
    places: Mapping[str, _Place],
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
            value, group = layouts.ours(layout, array).astype(kind, copy=False), stacked[path]
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
    found = {_stored(_tables(model), path)[0] for path, leaf in shapes.items() if leaf.shape != others[path].shape}
    if not found:
        raise InputError(f"{folder}: new_head is true; a model for {model.task} gives no labels: leave it out")
    return found


def _account(
    folder: Path, model: Any, places: Mapping[str, _Place], stored: Mapping[str, tensors.Stored], unread: Container[str]
) -> dict[str, tensors.Stored]:
    """Return ``{HF name: where}`` of the params the file has, but for those ``unread``; anything not explained is an error."""
    tables = _tables(model)
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


def _misshapen(folder: Path, model: Any, name: str, where: tensors.Stored, place: _Place) -> str:
    hint = ""
    if "embeddings/word/embedding" in place.params:
        hint = f" (vocab_size is {model.config.vocab_size}, the file has {where.shape[:1][0]} rows)"
    cut = {path for layers in models.cuts(model).values() for units in layers for path in units.axes}
    if cut & place.params.keys() and all(
        found <= asked for found, asked in zip(where.shape, place.shape, strict=False)
    ):
        hint = " (were heads or neurons cut? then take the config.json that was written with these weights)"
    head = any(_any(_tables(model).HEAD, path) for path in place.params)
    if head and model.task != "question-answering" and where.shape[1:] == place.shape[1:]:
        labels = f"num_labels is {model.config.num_labels}, the file has {where.shape[:1][0]} labels"
        hint = f" ({labels}: pass num_labels, or new_head where they are of another task)"
    return f"{where.file}: {name!r} has shape {where.shape}; {folder / 'config.json'} asks for {place.shape}{hint}"


def _any(patterns: Iterable[str], text: str) -> bool:
    return any(re.fullmatch(pattern, text) for pattern in patterns)


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_pretrained(
    path: str | os.PathLike[str],
    model: Any,
    params: Params,
    *,
    source: str | Path | None = None,
    labels: Sequence[str] = (),
    kept: Masks | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a folder that `load_pretrained` and Hugging Face ``transformers`` open with equal results.

    That of a model that was cut is a compact checkpoint, which says its widths in config.json and opens here alone; write
    what `dsee_jax.compaction.expand` makes of it for others. ``path`` is whole or not there (`dsee_jax.ckpt.folders`).

    Args:
      path: the folder to make; its parents are made too.
      model: as from `load_pretrained`.
      params: all its params; masks and updates already folded in.
      source: the folder the model came from (what `resolve` takes): tokenizer files are copied from it, and fields of its
        config.json that this library does not use are kept.
      labels: names of the classes, in the order of the logits; empty: those of the source, or LABEL_0 ...
      kept: the units there were before any cut, True = kept, to put beside the weights.
      max_shard_size: bytes, or a text such as "5GB"; larger weights are split over several files.
      overwrite: replace what stands at ``path``.

    Raises:
      InputError: ``path`` exists and is not an empty folder (without ``overwrite``), ``params`` are not the model's, or
        ``labels`` are not as many as its classes.
    """
    origin = None if source is None else resolve(source)
    arrays, config = named(model, params), _config(model, origin, labels)
    kinds = {str(array.dtype) for array in arrays.values()}
    config["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    with folders.whole(path, overwrite=overwrite) as staging:
        tensors.write(staging, arrays, max_shard_size=max_shard_size)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        cuts.write(staging, kept)
        if origin is not None:
            copy_files(origin, staging, (*TOKENIZER_FILES, GENERATION))


def copy_files(source: Path, folder: Path, names: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copy files of one folder, as many as it has of those named, into another."""
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def names(model: Any) -> dict[str, tuple[str, Layout]]:
    """Return ``{path of a param: (its name in the files, layout)}``; params that share a tensor have one name."""
    return {
        path: (_written(model, name), layout)
        for name, place in _places(model).items()
        for path, layout in place.params.items()
    }


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model that does not scan, by their names in the files."""
    return {_written(model, name): place.shape for name, place in _places(model).items()}


def _written(model: Any, name: str) -> str:
    """A bare model has its names without the prefix, as Hugging Face writes them."""
    return name.removeprefix(_tables(model).PREFIX) if model.task == "features" else name


def named(model: Any, params: Params) -> dict[str, np.ndarray]:
    """Return params, or anything of their shapes, under Hugging Face's names and in its layouts; layers of a stack apart.

    Raises:
      InputError: ``params`` are not the model's.
    """
    if getattr(model, "scan", False):
        model, params = model.clone(scan=False), stacks.unstack(processes.whole(params))
    flat, places = tree.flatten(params), _places(model)
    known = {path for place in places.values() for path in place.params}
    for path in flat.keys() - known:
        raise InputError(f"the model has no param {path!r}{did_you_mean(path, known)}")
    arrays = {}
    for name, place in places.items():
        held = {path: np.asarray(tree.get(params, path)) for path in place.params}
        for path, array in held.items():
            if (shape := layouts.stored_shape(place.params[path], array.shape)) != place.shape:
                raise InputError(f"{path!r} has shape {shape} as {name!r}; the model asks for {place.shape}")
        arrays[_written(model, name)] = layouts.theirs(tuple(place.params.values()), tuple(held.values()))
    return arrays


def _config(model: Any, origin: Path | None, labels: Sequence[str]) -> dict[str, Any]:
    config = read_json(origin / "config.json") if origin else {}
    for name in ("_name_or_path", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    own = fields.write(model.config)
    config = {name: value for name, value in config.items() if name not in fields.names(model.config)} | own
    config |= {"model_type": model.config.model_type}
    config["architectures"] = [models.architecture(model)]
    if model.task == "sequence-classification" and model.config.pad_token_id is None:
        # Hugging Face's decoders take the last token that is not this one; without it they refuse more than one text.
        end = config.get("eos_token_id")
        config["pad_token_id"] = next(iter(end), 0) if isinstance(end, list) else end or 0
    count = model.config.num_labels
    if labels and len(labels) != count:
        raise InputError(f"labels has {len(labels)} names; the model has num_labels = {count}: give one each")
    if model.task not in ("features", "causal-lm") and (labels or len(config.get("id2label") or ()) != count):
        names = list(labels) or [f"LABEL_{number}" for number in range(count)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config
