"""The class names of a checkpoint and of a task: the logits of a classifier have the order of the task."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax import models, tree
from dsee_jax.ckpt import hf
from dsee_jax.ckpt.folders import MODEL_CONFIG, read_json
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model
from dsee_jax.typing import Params

log = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"(label|class)?[_\W]*\d+", re.IGNORECASE)
"""Names that only number the classes, such as Hugging Face's LABEL_0."""


def align(folder: Path, model: Model, params: Params, labels: Sequence[str]) -> tuple[Params, tuple[str, ...]]:
    """Return params whose logits have the order of ``labels``, and the class names as the checkpoint writes them.

    Names are equal where they differ in case and in ``-``, ``_`` and spaces only. A classifier that the checkpoint lacks, or
    whose classes are only numbered (LABEL_0), has the order of the task already; its classes are called ``labels``.

    Args:
      folder: the checkpoint; its config.json names the classes (``id2label``).
      model: as from `hf.load_pretrained`, with one label for each of ``labels``.
      params: its params.
      labels: the class names of the task; empty: there are none.

    Raises:
      InputError: the checkpoint names other classes than the task.
    """
    own, axes = tuple(labels), models.label_axes(model)
    names = _names(folder, len(own)) if hf.stored(folder, model, axes) else ()
    keys, wanted = (tuple(map(_key, each)) for each in (names, own))
    same = sorted(keys) == sorted(wanted)
    if not names or names == own or (not same and all(map(_PLACEHOLDER.fullmatch, names))):
        return params, own
    if not same and own == tuple(map(str, range(len(own)))):
        log.warning("%s: the labels of the task are numbers: class i is the one of %s", folder, _listed(names))
        return params, own
    if not same or len({*keys}) < len(keys):
        raise InputError(
            f"{folder / MODEL_CONFIG}: id2label names the classes {_listed(names)}; the task has {_listed(own)}: set "
            "model.new_head: true for a new classifier, or, where they mean the same, write the task's names into id2label"
        )
    order = [keys.index(key) for key in wanted]
    if order != sorted(order):
        log.warning("%s: the classes %s are put into the order of the task, %s", folder, _listed(names), _listed(own))
        flat = tree.flatten(params)
        params = tree.unflatten({path: _taken(leaf, axes.get(path), order) for path, leaf in flat.items()})
    return params, tuple(names[number] for number in order)


def _names(folder: Path, count: int) -> tuple[str, ...]:
    """Return the class names of a checkpoint by index; empty where its config.json does not name ``count`` classes."""
    names = read_json(folder / MODEL_CONFIG).get("id2label")
    if not isinstance(names, Mapping) or sorted(names) != sorted(map(str, range(count))):
        return ()
    return tuple(str(names[str(number)]) for number in range(count))


def _key(name: str) -> str:
    return re.sub(r"[-_\s]+", "_", name.casefold().strip())


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def _taken(leaf: Any, axis: int | None, order: Sequence[int]) -> Any:
    if axis is None:
        return leaf
    return jax.jit(lambda x: jnp.take(x, jnp.asarray(order), axis=axis), out_shardings=leaf.sharding)(leaf)
