"""Where each param is in a Hugging Face file: the name of its tensor, its layout there, and params written that way."""

import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import hf_layout, models, stacks, tree
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.hf_layout import Layout
from dsee_jax.runtime import multihost
from dsee_jax.typing import Params


class Place(NamedTuple):
    """What a tensor of a file holds."""

    params: dict[str, Layout]  # by path; several where they share the tensor
    shape: tuple[int, ...]  # in the file


def tables_of(model: Any) -> ModuleType:
    """Return the module of the architecture of ``model``."""
    return models.find(model.config.model_type)


def places_of(model: Any) -> dict[str, Place]:
    """Return ``{HF name: place}`` for every param of the model, in the order of its tree."""
    tables, places = tables_of(model), {}
    for path, leaf in tree.flatten(models.shapes(model)).items():
        name, layout = stored_as(tables, path)
        layout = hf_layout.resolved(layout, model.config)
        place = places.setdefault(name, Place({}, hf_layout.stored_shape(layout, leaf.shape)))
        place.params[path] = layout
    return places


def stored_as(tables: ModuleType, path: str) -> tuple[str, Layout]:
    """Return the name of the tensor that holds a param, and how it stands there; `InputError` where there is none."""
    known = {ours: (theirs, layout) for ours, theirs, layout in tables.HF_NAMES}
    number = re.search(r"(?<=_)\d+(?=/)", path)
    general = path.replace(number[0], "{i}", 1) if number else path
    if general not in known:
        raise InputError(f"{tables.Config.model_type} has no param {path!r}{did_you_mean(general, known)}")
    theirs, layout = known[general]
    return theirs.format(i=number[0] if number else ""), layout


def locations(config: Mapping[str, Any], paths: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, Layout]]:
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
        name, layout = stored_as(tables, path)
        if layout.block:
            layout = hf_layout.resolved(layout, tables.Config.from_hf(config))
        found[path] = (written.get(name, name), layout)
    return found


def names(model: Any) -> dict[str, tuple[str, Layout]]:
    """Return ``{path of a param: (its name in the files, layout)}``; params that share a tensor have one name."""
    return {
        path: (_written(model, name), layout)
        for name, place in places_of(model).items()
        for path, layout in place.params.items()
    }


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model that does not scan, by their names in the files."""
    return {_written(model, name): place.shape for name, place in places_of(model).items()}


def _written(model: Any, name: str) -> str:
    """A bare model has its names without the prefix, as Hugging Face writes them."""
    return name.removeprefix(tables_of(model).PREFIX) if model.task == "features" else name


def hf_tensors(model: Any, params: Params) -> dict[str, np.ndarray]:
    """Return params, or anything of their shapes, under Hugging Face's names and in its layouts; layers of a stack apart.

    Raises:
      InputError: ``params`` are not the model's.
    """
    if getattr(model, "scan", False):
        model, params = model.clone(scan=False), stacks.unstack(multihost.to_host(params))
    flat, places = tree.flatten(params), places_of(model)
    known = {path for place in places.values() for path in place.params}
    for path in flat.keys() - known:
        raise InputError(f"the model has no param {path!r}{did_you_mean(path, known)}")
    arrays = {}
    for name, place in places.items():
        held = {path: np.asarray(tree.get(params, path)) for path in place.params}
        for path, array in held.items():
            if (shape := hf_layout.stored_shape(place.params[path], array.shape)) != place.shape:
                raise InputError(f"{path!r} has shape {shape} as {name!r}; the model asks for {place.shape}")
        arrays[_written(model, name)] = hf_layout.to_hf(tuple(place.params.values()), tuple(held.values()))
    return arrays
