"""The tensor of a Hugging Face file that holds each param: its name, its layout, and params written that way."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import hf_layout, models, stacks, tree
from dsee_jax.ckpt.spelling import unwrapped
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.hf_layout import LAYER, Layout
from dsee_jax.models.architecture import Architecture, Model, scans
from dsee_jax.runtime import multihost
from dsee_jax.typing import Params


class Place(NamedTuple):
    """The params that one tensor of a file holds."""

    params: dict[str, Layout]  # by path; several where params share the tensor
    shape: tuple[int, ...]  # of the tensor in the file


def places_of(model: Model) -> dict[str, Place]:
    """Return ``{HF name: place}`` for every param of the model, in the order of its tree."""
    architecture, places = models.find(model.config.model_type), {}
    for path, leaf in tree.flatten(models.shapes(model)).items():
        name, layout = tensor_of(architecture, path)
        layout = hf_layout.resolved(layout, model.config)
        place = places.setdefault(name, Place({}, hf_layout.stored_shape(layout, leaf.shape)))
        place.params[path] = layout
    return places


def tensor_of(architecture: Architecture, path: str) -> tuple[str, Layout]:
    """Return the HF name of the tensor that holds a param, and its layout; raises `InputError` for an unknown path."""
    rows = {general: (name, layout) for general, name, layout in architecture.hf_names}
    layer = re.search(LAYER, path)
    general = f"{path[: layer.start('unit')]}{{i}}{path[layer.end('unit') :]}" if layer else path
    if general not in rows:
        raise InputError(f"{'/'.join(architecture.model_types)} has no param {path!r}{did_you_mean(general, rows)}")
    name, layout = rows[general]
    return name.format(i=layer["unit"] if layer else ""), layout


def locations(config: Mapping[str, Any], paths: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, Layout]]:
    """Return the tensor of a file that holds each param, with its layout.

    Args:
      config: the file's config.json.
      paths: of params.
      names: of the file's tensors.

    Returns:
      ``{path: (name, layout)}``; a param that the file lacks, such as a task head, gets Hugging Face's name.

    Raises:
      InputError: the architecture is not supported, or has no such param.
    """
    architecture = models.of_config(config)
    written: dict[str, str] = {}
    for name in names:
        today = unwrapped(name)
        written |= {today: name, architecture.prefix + today: name}
    places = {}
    for path in paths:
        name, layout = tensor_of(architecture, path)
        if layout.block:
            layout = hf_layout.resolved(layout, architecture.config.from_hf(config, allow_unknown=True))
        places[path] = (written.get(name, name), layout)
    return places


def names(model: Model) -> dict[str, tuple[str, Layout]]:
    """Return ``{path of a param: (its name in the files, layout)}``; params that share a tensor share the name."""
    return {
        path: (_written(model, name), layout)
        for name, place in places_of(model).items()
        for path, layout in place.params.items()
    }


def to_rules(model: Model, targets: Iterable[Any]) -> tuple[str, ...]:
    """Return rules over the paths of a model, with rules for targets that name modules of Hugging Face, as in PEFT.

    ``q_proj`` or ``self_attn.q_proj`` is the end of a module's name; a tensor that holds several kernels stands for all of
    them. Other targets are returned as they are.

    Raises:
      InputError: a target states an orientation: all kernels of these models are (in, out).
    """
    layered = model.clone(scan=False) if scans(model) else model
    kernels = {path: name for path, (name, _) in names(layered).items() if path.endswith("/kernel")}
    rules: list[str] = []
    for target in targets:
        if not isinstance(target, str):
            raise InputError(f"delta.targets {target!r}: the kernels of this model are (in, out); give the regex alone")
        plain = re.fullmatch(r"[\w.-]+", target) and not any(f"/{target}/kernel" in f"/{path}" for path in kernels)
        ends = f".{target}.weight"
        matched = [path for path, name in kernels.items() if f".{name}".endswith(ends)] if plain else []
        paths = [stacks.place(path)[0] for path in matched] if scans(model) else matched
        every = [re.sub(r"layer_\d+", r"layer_\\d+", path) for path in paths]
        exact = all(path in matched for path in kernels for rule in every if re.fullmatch(rule, path))
        rules += dict.fromkeys(every if exact else paths) or [target]
    return tuple(rules)


def stored_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model that does not scan, by their names in the files."""
    return {_written(model, name): place.shape for name, place in places_of(model).items()}


def _written(model: Model, name: str) -> str:
    """Return the name that Hugging Face writes: a bare model's without the prefix."""
    prefix = models.find(model.config.model_type).prefix
    return name.removeprefix(prefix) if model.task == "features" else name


def hf_tensors(model: Model, params: Params) -> dict[str, np.ndarray]:
    """Return params, or any tree of their shapes, under Hugging Face's names and layouts, with stacked layers separated.

    Raises:
      InputError: ``params`` do not belong to the model.
    """
    if scans(model):
        model, params = model.clone(scan=False), stacks.unstack(multihost.to_host(params))
    flat, places = tree.flatten(params), places_of(model)
    paths = {path for place in places.values() for path in place.params}
    for path in flat.keys() - paths:
        raise InputError(f"the model has no param {path!r}{did_you_mean(path, paths)}")
    tensors = {}
    for name, place in places.items():
        arrays = {path: np.asarray(tree.get(params, path)) for path in place.params}
        for path, array in arrays.items():
            if (shape := hf_layout.stored_shape(place.params[path], array.shape)) != place.shape:
                raise InputError(f"{path!r} has shape {shape} as {name!r}; the model asks for {place.shape}")
        tensors[_written(model, name)] = hf_layout.to_hf(tuple(place.params.values()), tuple(arrays.values()))
    return tensors
