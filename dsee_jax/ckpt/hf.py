"""Read a model from a Hugging Face folder: ``config.json`` and safetensors.

The architecture accounts for every tensor of a file: an unexpected, missing or misshapen tensor is an error. Only a missing
task head is created, with a warning on the logger ``dsee_jax.ckpt.hf``.
"""

import logging
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import hf_layout, models, stacks, tree
from dsee_jax.ckpt import formats, kept_units, tensors, tied
from dsee_jax.ckpt.folders import KEPT, MODEL_CONFIG
from dsee_jax.ckpt.hf_names import Place, places_of, tensor_of
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.ckpt.spelling import unwrapped
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.models.architecture import Architecture, Model, scans
from dsee_jax.prune import compaction
from dsee_jax.typing import Key

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_THREADS = 2
"""Threads that read and transpose arrays. More threads would hold more arrays in memory at a time."""

_LARGE = 1 << 20
"""Bytes from which a thread loads an array; the hand-over of a smaller array takes longer than its copy."""

Sharding: TypeAlias = Callable[[str], jax.sharding.Sharding]
"""Path of a param -> its sharding."""


class ModelOptions(TypedDict, total=False):
    """How a model computes. Decoders alone have ``scan`` and ``remat``."""

    dtype: str
    """float32 (the default) or bfloat16, of the matrix products."""
    scan: bool
    """Run the layers by ``jax.lax.scan``; their params are stacked (`dsee_jax.stacks`). Default: false."""
    remat: bool
    """Recompute the inside of every layer in the backward pass. Default: false."""
    allow_unknown: bool
    """Ignore fields of config.json that this library does not know, with a warning. Default: false, they are an error."""


def _model(
    folder: Path,
    task: str,
    num_labels: int,
    *,
    dtype: str = "float32",
    scan: bool = False,
    remat: bool = False,
    allow_unknown: bool = False,
) -> Model:
    config = formats.model_config(folder)
    try:
        architecture = models.of_config(config)
        if task not in architecture.tasks:
            near = did_you_mean(task, architecture.tasks)
            raise InputError(f"task {task!r} is not supported{near}; supported: {', '.join(architecture.tasks)}")
        if task == "question-answering" and num_labels != 2:
            raise InputError(f"num_labels is {num_labels}; {task} has 2: the start and the end of the answer")
        run = {"num_labels": num_labels, "dtype": dtype, "allow_unknown": allow_unknown}
        model = architecture.model(architecture.config.from_hf(config, **run), task)
        for name, wanted, done in (("scan", scan, "scanned"), ("remat", remat, "recomputed")):
            if wanted and not hasattr(model, name):
                raise InputError(
                    f"layers of {model.config.model_type!r} cannot be {done}, only those of decoders: use {name}=False"
                )
        model = model.clone(**{name: True for name, wanted in (("scan", scan), ("remat", remat)) if wanted})
        if scan:
            models.shapes(model)  # Raises where layers differ.
        return model
    except InputError as error:
        raise InputError(f"{folder / MODEL_CONFIG}: {error}") from None


def abstract_model(
    path: str | Path, task: str = "sequence-classification", num_labels: int = 2, **options: Unpack[ModelOptions]
) -> Model:
    """Return the model of `load_pretrained` from ``config.json`` alone; raises `InputError` as `load_pretrained` does."""
    return _model(resolve(path, weights=False), task, num_labels, **options)


def load_pretrained(
    path: str | Path,
    task: str = "sequence-classification",
    num_labels: int = 2,
    *,
    param_dtype: str = "float32",
    new_head: bool = False,
    sharding: Callable[[Model], Sharding] | None = None,
    key: Key | None = None,
    **options: Unpack[ModelOptions],
) -> tuple[Model, dict[str, Any]]:
    """Read a model.

    Two threads read large arrays and place them on their devices, the largest first, at most three at a time. Memory
    therefore peaks little above the size of the weights.

    Args:
      path: a Hugging Face folder, a GGUF file, a hub id, ``package:NAME`` or a URL of a store, see `resolve`.
      task: sequence-classification, token-classification, question-answering, causal-lm or features (the last hidden state,
        no head).
      num_labels: columns of the classifier; 1 for regression, 2 for question-answering.
      param_dtype: float32 or bfloat16, of the params, whatever the dtype of the file.
      new_head: re-initialise the params that give the labels although the file has them: the model was tuned on another
        task. The other params of the head, such as the pooler of BERT, are read.
      sharding: ``model -> (path -> sharding)``, called before any param is read; None: the default device.
      key: for a head that the checkpoint lacks: kernels are normal with the config's initializer_range (0.02), biases 0.
        None: ``jax.random.key(0)``.
      **options: ``dtype``, ``scan``, ``remat`` and ``allow_unknown``, see `ModelOptions`.

    Returns:
      ``(model, params)``: a Linen module, and nested dicts with kernels (in, out), stacked ones (layers, in, out).

    Raises:
      InputError: one line that names the part that is missing, unreadable, not implemented, unexpected or misshapen.
    """
    folder = resolve(path)
    model, dtype = _model(folder, task, num_labels, **options), _param_dtype(param_dtype)
    index = tensors.index(folder)
    _check_depth(folder, model, index)
    model, index = tied.resolve(folder, model, index)
    layered = model.clone(scan=False) if scans(model) else model
    try:
        compaction.check(layered, kept_units.read(folder))
    except InputError as error:
        raise InputError(f"{folder / KEPT}: {error}: this file and config.json must be written together") from None
    places = places_of(layered)
    matched = _matched(folder, layered, index, places, _label_tensors(folder, layered) if new_head else set())
    shapes = {path: leaf.shape for path, leaf in tree.flatten(models.shapes(layered)).items()}
    groups = {path: [path] for path in shapes} if model is layered else _stacked(model, shapes)
    placed = None if sharding is None else sharding(model)
    # Threads do not inherit the context of the caller.
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

    def put(path: str, array: np.ndarray) -> tuple[str, jax.Array]:
        with jax.default_device(device):
            return path, _put(path, array, placed)

    with ThreadPoolExecutor(_THREADS) as pool:
        arrays = _arrays(matched, places, groups, dtype, pool)
        flat = dict(_in_turn(_start(pool, array.nbytes, put, path, array) for path, array in arrays))
    created = [path for stacked, members in groups.items() for path in members if stacked not in flat]
    if created:
        reason = "the head of another task is left in %s, %s" if new_head else "%s has no %s"
        log.warning(f"{reason}: created at random", folder, ", ".join(created))
    for number, path in enumerate(created):
        value = np.zeros(shapes[path], np.float32)
        if not path.endswith("bias"):
            own = jax.random.fold_in(jax.random.key(0) if key is None else key, number)
            value = model.config.initializer_range * np.asarray(jax.random.normal(own, shapes[path]))
        flat[path] = _put(path, value.astype(dtype), placed)
    return model, tree.unflatten({path: flat[path] for path in groups})


def stored(path: str | Path, model: Model, paths: Iterable[str]) -> list[str]:
    """Return those of ``paths``, params of a model that are not stacked, that a checkpoint holds; reads headers only."""
    architecture = models.find(model.config.model_type)
    names = {unwrapped(name) for name in tensors.index(resolve(path))}
    names |= {architecture.prefix + name for name in names}
    return [path for path in paths if tensor_of(architecture, path)[0] in names]


def _arrays(
    matched: Mapping[str, tensors.Stored],
    places: Mapping[str, Place],
    groups: Mapping[str, Sequence[str]],
    dtype: np.dtype[Any],
    pool: Executor,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield ``(path, param)`` for the params that files hold, stacked ones once their last layer is read.

    The largest come first: the second copy of an array during its conversion then never adds to all other arrays.
    """
    group_of = {path: group for group, members in groups.items() for path in members}

    def order(name: str) -> tuple[int, str]:
        stacked = [group_of[path] for path in places[name].params]
        return -matched[name].nbytes * max(len(groups[group]) for group in stacked), min(stacked)

    partial: dict[str, tuple[np.ndarray, set[str]]] = {}
    names = sorted(matched, key=order)
    for name, array in _in_turn(_start(pool, matched[name].nbytes, _read, name, matched[name]) for name in names):
        for path, layout in places[name].params.items():
            value, group = hf_layout.to_ours(layout, array).astype(dtype, copy=False), group_of[path]
            members = groups[group]
            if group == path:
                yield path, value
                continue
            if group not in partial:
                # The stack has the order of the file: a layer is one plain copy, and `_put` transposes all layers at once.
                stack = np.empty((len(members), *(value.T if layout.transposed else value).shape), dtype)
                partial[group] = stack.swapaxes(1, -1) if layout.transposed else stack, set(members)
            stack, unread = partial[group]
            stack[members.index(path)] = value
            unread.remove(path)
            if not unread:
                yield group, partial.pop(group)[0]


def _start(pool: Executor, nbytes: int, task: Callable[..., Result], *args: Any) -> Callable[[], Result]:
    """Start a task on an array, in the pool if the array is `_LARGE`; return the call that waits for the task's result."""
    if nbytes >= _LARGE:
        return pool.submit(task, *args).result
    result = task(*args)
    return lambda: result


def _in_turn(started: Iterator[Callable[[], Result]]) -> Iterator[Result]:
    """Yield the results of tasks in order. Taking an item of ``started`` starts its task, one ahead of the result."""
    pending = next(started, None)
    while pending:
        following = next(started, None)
        yield pending()
        pending = following


def _read(name: str, stored: tensors.Stored) -> tuple[str, np.ndarray]:
    array = tensors.read(stored)
    if not tensors.finite(array):
        raise InputError(
            f"{stored.file}: {name!r} holds NaN or infinities: the checkpoint is of a diverged run, or damaged"
        )
    return name, array


def _put(path: str, array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """Place an array on its devices; each process touches its own part only."""
    if sharding is None:
        placed = jax.device_put(array)
    else:
        placed = jax.make_array_from_callback(array.shape, sharding(path), lambda part: array[part])
    # Ready before its thread takes another: a device that lags behind would keep the arrays of the file alive as well.
    return jax.block_until_ready(placed)


def _param_dtype(name: str) -> np.dtype[Any]:
    if name not in ("float32", "bfloat16"):
        raise InputError(f"param_dtype is {name!r}; use float32 or bfloat16")
    return jnp.dtype(name)


def _stacked(model: Model, paths: Iterable[str]) -> dict[str, list[str]]:
    """Return ``{path of a param of a model that scans: paths of its layers}``, in the order of the model's tree."""
    members = stacks.groups(paths)
    return {path: members[path] for path in tree.flatten(models.shapes(model))}


def _check_depth(folder: Path, model: Model, names: Iterable[str]) -> None:
    """Raise `InputError` if the file lacks layers, before the shapes of a model of many layers are computed."""
    layers = [int(match["unit"]) for name in names if (match := re.search(hf_layout.LAYER, name))]
    depth = len(next(iter(model.config.widths.values())))
    if depth > (stored := max(layers, default=-1) + 1):
        raise InputError(
            f"{folder / MODEL_CONFIG}: the model has {depth} layers, the weights have {stored}; config.json and the "
            "weights must belong to one model"
        )


def _label_tensors(folder: Path, model: Model) -> set[str]:
    """Return the HF names of the params that give the labels: ``num_labels`` decides their shapes."""
    architecture = models.find(model.config.model_type)
    names = {tensor_of(architecture, path)[0] for path in models.label_axes(model)}
    if not names:
        raise InputError(f"{folder}: new_head is true; a model for {model.task} gives no labels: leave it out")
    return names


def _matched(
    folder: Path,
    model: Model,
    index: Mapping[str, tensors.Stored],
    places: Mapping[str, Place],
    skipped: Container[str],
) -> dict[str, tensors.Stored]:
    """Return the tensors of a folder that hold the model's params, by HF name, without the ``skipped`` names.

    Raises:
      InputError: a tensor that belongs to no param and is not known to be ignorable, a param without a tensor that is no
        part of a missing head, or a tensor of another shape.
    """
    architecture = models.find(model.config.model_type)
    prefix = architecture.prefix
    head = {name for path, name, _ in architecture.hf_names if _any(architecture.head, path)}
    matched: dict[str, tensors.Stored] = {}
    unexpected, ignored = [], []
    for stored_name, stored in index.items():
        name = unwrapped(stored_name)
        if prefix + name in places or prefix + name in head:
            name = prefix + name
        if name in matched:
            raise InputError(f"{stored.file} holds {name!r} twice, under an old name or without {prefix!r} too")
        if name in places and name not in skipped:
            matched[name] = stored
        elif name in head or _any(architecture.ignored_names, stored_name):
            ignored.append(stored_name)
        else:
            unexpected.append(stored_name)
    paths = [path for name in matched for path in places[name].params]
    missing = [
        name
        for name, place in places.items()
        if name not in matched and not all(_creatable(architecture, path, paths) for path in place.params)
    ]
    if unexpected or missing:
        kind = model.config.model_type
        parts = [f"tensors that {kind} has no place for ({len(unexpected)}): {_few(unexpected)}"] if unexpected else []
        parts += [f"tensors missing ({len(missing)}): {_few(missing)}"] if missing else []
        near = did_you_mean(unexpected[0], missing or places) if unexpected else ""
        raise InputError(f"{folder}: {'; '.join(parts)}{near}; config.json and the weights must belong to one model")
    if ignored:
        log.info("%s: not used: %s", folder, _few(ignored))
    for name, stored in matched.items():
        if stored.dtype in tensors.DTYPES and stored.dtype not in tensors.FLOATS:
            raise InputError(
                f"{stored.file}: {name!r} is stored as {stored.dtype}; the weights of a model are floating-point "
                f"numbers ({', '.join(tensors.FLOATS)}): give the model in floating point, not quantised"
            )
        if stored.shape != places[name].shape:
            raise InputError(_misshapen(folder, model, name, stored, places[name]))
    return matched


def _creatable(architecture: Architecture, path: str, paths: Iterable[str]) -> bool:
    """Return whether ``path`` belongs to a head of which a file, which has the params ``paths``, has nothing at all."""
    parent = path.rpartition("/")[0]
    return _any(architecture.head, path) and not any(other.startswith(f"{parent}/") for other in paths)


def _misshapen(folder: Path, model: Model, name: str, stored: tensors.Stored, place: Place) -> str:
    hint = ""
    if "embeddings/word/embedding" in place.params:
        hint = f" (vocab_size is {model.config.vocab_size}, the file has {stored.shape[:1][0]} rows)"
    prunable = {path for layers in models.cuts(model).values() for units in layers for path in units.axes}
    smaller = all(size <= expected for size, expected in zip(stored.shape, place.shape, strict=False))
    if prunable & place.params.keys() and smaller:
        hint = " (were heads or neurons pruned? then take the config.json that was written with these weights)"
    head = any(_any(models.find(model.config.model_type).head, path) for path in place.params)
    if head and model.task != "question-answering" and stored.shape[1:] == place.shape[1:]:
        labels = f"num_labels is {model.config.num_labels}, the file has {stored.shape[:1][0]} labels"
        hint = f" ({labels}; new_head re-initialises the head for other labels)"
    return f"{stored.file}: {name!r} has shape {stored.shape}; {folder / MODEL_CONFIG} asks for {place.shape}{hint}"


def _any(patterns: Iterable[str], text: str) -> bool:
    return any(re.fullmatch(pattern, text) for pattern in patterns)


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
