"""Smaller arrays for a model without its pruned units, and the way back to the original shapes.

One table of `Indices` cuts every tree of a model: params, masks, updates and the moments of an optimiser. The coordinates of
supports and the layers are renumbered. A leaf that would become empty is removed.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import models, tree
from dsee_jax.deltas.adapter import kernels
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.models import hf_config
from dsee_jax.models.architecture import Model, ModelConfig, scans
from dsee_jax.prune import layers
from dsee_jax.prune.layers import layer
from dsee_jax.prune.units import kept as kept_units
from dsee_jax.runtime import multihost
from dsee_jax.typing import Array, Masks, Params, Supports


class Indices(NamedTuple):
    """The parts of every tree of a model that stay."""

    axes: Mapping[str, Mapping[int, np.ndarray]]
    """``{path before the cut: {axis: kept indices, int}}``; paths start with ``params/``, ``deltas/`` or ``supports/``."""
    layers: Array | None = None
    """bool (layers,), True = kept. None: no layer is dropped."""


KINDS = frozenset({"heads", "neurons", "layers", "hidden"})
"""The kinds of units, the keys of a tree of kept units."""


def compact(model: Model, params: Params, masks: Masks) -> tuple[Model, dict[str, Any]]:
    """Remove pruned units from a model; the result gives the logits of the masked model.

    The masked model is ``masks.apply(params, masks)`` for masks of params, and `dsee_jax.prune.masked` for kept units.
    `cut_tree` and `cut_supports` cut attached updates. The equal masked model is then
    ``masks.apply(materialize(...), masks)``.

    Args:
      model: as from `load_pretrained`.
      params: the params of the model.
      masks: masks of params as from `dsee_jax.prune.structured`, or kept units as from `dsee_jax.prune.select`. Layers may
        differ and may lose all of their units.

    Returns:
      ``(small model, small params)``. The config of the small model holds the widths of every layer.

    Raises:
      InputError: a mask prunes a part of a unit, or does not fit the model.
    """
    kept = masks if masks.keys() <= KINDS else kept_units(params, models.cuts(model), masks)
    table = indices(model, kept)
    return resized(model, kept), cut_tree({"params": params}, table)["params"]


def resized(model: Model, kept: Masks) -> Model:
    """Return the model without params, in the sizes that ``kept`` leaves; a layer that is not in ``kept`` keeps its width."""
    config, numbers = model.config, range(layers.depth(model.config))
    widths = {
        kind: tuple(
            int(np.sum(kept.get(kind, {}).get(layer(number), config.widths[kind][number]))) for number in numbers
        )
        for kind in config.widths
    }
    named = _named(model.config)
    names = {kind: _numbers(config, kind, field, kept[kind]) for kind, field in named.items() if kind in kept}
    if "layers" in kept:
        stay = np.flatnonzero(kept["layers"])
        widths = {kind: tuple(of_layers[number] for number in stay) for kind, of_layers in widths.items()}
        names = {kind: tuple(of_layers[number] for number in stay) for kind, of_layers in names.items()}
        config = config.with_layers([bool(flag) for flag in kept["layers"]])
    if "hidden" in kept:
        config = config.with_hidden(int(np.sum(kept["hidden"])))
    config = config.with_widths(**widths)
    left = hf_config.kept_kinds(config)
    fields = {named[kind]: of_layers if kind in left else None for kind, of_layers in names.items()}
    return model.clone(config=dataclasses.replace(config, **fields))


def _named(config: ModelConfig) -> dict[str, str]:
    """Return ``{kind: config field}`` of the kinds whose units a config names, see `UnitTemplate.numbers`."""
    return {
        kind: template.numbers for kind, template in models.find(config.model_type).cuts.items() if template.numbers
    }


def _numbers(config: ModelConfig, kind: str, field: str, kept: Masks) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the kept units of one kind in every layer, as ``field`` holds them."""
    before = getattr(config, field) or [range(width) for width in config.widths[kind]]
    numbers = []
    for number, names in enumerate(before):
        flags = np.asarray(kept.get(layer(number), np.ones(len(names), bool)))
        # Flags over other units than those of the config are over all units of the pretrained model.
        names = names if len(flags) == len(names) else range(len(flags))
        numbers.append(tuple(names[unit] for unit in np.flatnonzero(flags)))
    return tuple(numbers)


def indices(
    model: Model, kept: Masks, deltas: Mapping[str, Any] | None = None, supports: Supports | None = None
) -> Indices:
    """Return the kept indices of all params, updates and supports that hold pruned units.

    Args:
      model: the model before the cut.
      kept: the kept units, True = kept (see `dsee_jax.prune.units`).
      deltas, supports: the updates of the model and their coordinates, or None.

    Raises:
      InputError: ``kept`` is no tree of kept units, is of layers or of numbers of units that the model does not have, or
        leaves no layer or no hidden dimension; or the model scans its layers.
    """
    if scans(model):
        raise InputError("the model scans its layers, and units are cut layer by layer: load it with scan=False")
    _check_form(model, kept)
    axes: dict[str, dict[int, np.ndarray]] = {}
    dropped = _checked(kept, "layers", layers.depth(model.config))
    for kind, by_layer in models.cuts(model).items():
        for number, units in enumerate(by_layer):
            flags = kept.get(kind, {}).get(layer(number))
            if flags is None or (dropped is not None and not dropped[number]):
                continue
            if np.shape(flags) != (model.config.widths[kind][number],):
                raise InputError(
                    f"layer {number} has {model.config.widths[kind][number]} {kind} and the kept units are of "
                    f"{np.size(flags)}: they belong to another model"
                )
            for path, (axis, entries) in units.axes.items():
                axes.setdefault(path, {})[axis] = np.flatnonzero(np.repeat(flags, entries))
    if (wide := _checked(kept, "hidden", model.config.hidden_size)) is not None:
        for path, own in models.hidden_axes(model).items():
            axes.setdefault(path, {}).update(dict.fromkeys(own, np.flatnonzero(wide)))
    table: dict[str, dict[int, np.ndarray]] = {f"params/{path}": of_axis for path, of_axis in axes.items()}
    coordinates = tree.flatten(supports or {})
    for path, delta in kernels(deltas).items():
        if path not in axes:
            continue
        of_axis = axes[path]
        empty = any(not len(left) for left in of_axis.values())
        nothing = np.zeros(0, np.int64)
        if "a" in delta:
            table[f"deltas/{path}/a"] = {0: nothing} if empty else {k: i for k, i in of_axis.items() if k == 0}
            table[f"deltas/{path}/b"] = {0: nothing} if empty else {k: i for k, i in of_axis.items() if k == 1}
        if "values" in delta:
            support = multihost.to_host(coordinates[path])
            inside = np.all([np.isin(support[:, axis], left) for axis, left in of_axis.items()], axis=0)
            table[f"deltas/{path}/values"] = table[f"supports/{path}"] = {0: np.flatnonzero(inside)}
    return Indices(table, dropped)


def _check_form(model: Model, kept: Masks) -> None:
    """Raise `InputError` unless ``kept`` has kinds of units of the model, and layers of it where units are in layers."""
    kinds = (*models.cuts(model), *_NAMES)
    for kind in kept.keys() - set(kinds):
        raise InputError(
            f"the kept units have the key {kind!r}{did_you_mean(kind, kinds)}; expected {', '.join(kinds)}: pass kept units "
            "as from prune.select (masks of params are for compact and masks.apply)"
        )
    depth = layers.depth(model.config)
    for kind in kept.keys() - _NAMES.keys():
        if not isinstance(kept[kind], Mapping):
            raise InputError(
                f"the kept {kind} are of the type {type(kept[kind]).__name__}; expected a mapping of layers to flags: "
                f"{{{layer(0)!r}: flags, ...}}"
            )
        for name in sorted(kept[kind].keys() - {layer(number) for number in range(depth)}):
            raise InputError(
                f"the kept {kind} are of {name!r} and the model has the layers {layer(0)} to {layer(depth - 1)}: they belong "
                "to another model"
            )


def _checked(kept: Masks, kind: str, total: int) -> np.ndarray | None:
    """Return the flags of a kind of the whole model, or None; raises `InputError` where they do not fit or none is left."""
    if kind not in kept:
        return None
    flags = np.asarray(kept[kind])
    if flags.shape != (total,):
        raise InputError(
            f"the model has {total} {_NAMES[kind]} and the kept units are of {flags.size}: they belong to another model"
        )
    if not flags.any():
        raise InputError(f"no {_NAMES[kind]} of the model are kept: keep one or more of the {total}")
    return flags


_NAMES = {"layers": "layers", "hidden": "hidden dimensions"}
"""The words for the units of a kind of the whole model."""


def cut_tree(values: Any, indices: Indices) -> Any:
    """Return a pytree with its leaves cut: ``{"params", "deltas"}``, or the state of an optimiser of such a tree.

    The path of a leaf joins the keys of the dicts above it; tuples in between (the states of optax) do not count. A leaf
    without a path in ``indices`` stays as it is. Leaves and dicts that would become empty are removed, and dropped layers.
    """
    return _cut(values, indices, "")


def _cut(node: Any, indices: Indices, path: str) -> Any:
    if isinstance(node, Mapping):
        cut = {
            new: _cut(child, indices, f"{path}/{key}" if path else str(key))
            for key, child in node.items()
            if (new := layers.renamed(key, indices.layers)) is not None
        }
        return {key: child for key, child in cut.items() if not path or not _empty(child)}
    if isinstance(node, tuple):
        parts = [_cut(child, indices, path) for child in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    for axis, left in indices.axes.get(path, {}).items():
        node = node.take(left, axis=axis)
    return node


def _empty(node: Any) -> bool:
    return not node if isinstance(node, Mapping) else getattr(node, "size", 1) == 0


def moved(paths: Iterable[str], indices: Indices, params: Params) -> list[str]:
    """Return the paths of the arrays that the cut leaves of ``paths``; ``params`` are those after the cut."""
    left = tree.flatten(params)
    return [new for path in paths if (new := layers.moved(path, indices.layers)) in left]


def cut_supports(supports: Supports, indices: Indices) -> dict[str, Any]:
    """Return the kept coordinates, renumbered by the kept rows and columns of their kernels."""
    flat = tree.flatten(cut_tree({"supports": supports}, indices)["supports"])
    for path in tree.flatten(supports):
        support = flat.get(new := layers.moved(path, indices.layers) or "")
        if support is None:
            continue
        for axis, left in indices.axes.get(f"params/{path}", {}).items():
            support = jnp.asarray(support).at[:, axis].set(np.searchsorted(left, multihost.to_host(support)[:, axis]))
        flat[new] = support
    return tree.unflatten(flat)


def check(model: Model, kept: Masks) -> None:
    """Raise `InputError` unless ``kept``, over all original units, gives the sizes of ``model``; an empty tree passes."""
    depth = layers.depth(model.config)
    if "layers" in kept and (count := int(np.sum(kept["layers"]))) != depth:
        raise InputError(f"the model has {depth} layers and the kept units give {count}")
    width = model.config.hidden_size
    if "hidden" in kept and (count := int(np.sum(kept["hidden"]))) != width:
        raise InputError(f"the model has {width} hidden dimensions and the kept units give {count}")
    small, names = layers.renumbered(kept), {layer(number) for number in range(depth)}
    for name in {name for by_layer in small.values() for name in by_layer} - names:
        raise InputError(f"the kept units are of {name} and the model has no such layer")
    left = resized(_original(model, small), small).config
    if left.widths != model.config.widths:
        raise InputError(f"the model has the widths {model.config.widths} and the kept units give {left.widths}")
    for kind, field in _named(left).items():
        if (expected := getattr(left, field)) != (numbers := getattr(model.config, field)):
            raise InputError(
                f"the config of the model names the {kind} {shorten(repr(numbers))} in {field!r} and the kept units give "
                f"{shorten(repr(expected))}: they belong to another model"
            )


def _original(model: Model, kept: Masks) -> Model:
    """Return the model without params, in the widths before the pruning that ``kept``, of its own layers, describes."""
    return resized(model, jax.tree.map(np.ones_like, kept))


def expand(model: Model, params: Params, kept: Masks) -> tuple[Model, dict[str, Any]]:
    """Return the model and params in the original shapes, with zeros at the pruned heads and neurons.

    Dropped layers and hidden dimensions stay out: no zeros make a layer pass its input on, and norms count zeros.

    Args:
      model: the small model.
      params: the params of the small model, updates folded in.
      kept: the kept units over all original units, True = kept. A kind that is left out keeps the shapes of the small model.

    Raises:
      InputError: ``kept`` does not give the sizes of the small model.
    """
    check(model, kept)
    kept = layers.renumbered(kept)
    full = _original(model, kept)
    table, small = indices(full, kept).axes, tree.flatten(params)
    flat = {}
    for path, leaf in tree.flatten(models.shapes(full)).items():
        axes = table.get(f"params/{path}")
        if axes is None:
            flat[path] = small[path]
            continue
        flat[path] = dense = np.zeros(leaf.shape, leaf.dtype)
        if path in small:
            dense[np.ix_(*(axes.get(axis, np.arange(size)) for axis, size in enumerate(leaf.shape)))] = small[path]
    return full, tree.unflatten(flat)


def composed(first: Masks, second: Masks) -> dict[str, Any]:
    """Return the kept units of two cuts in a row, over the units before ``first``; ``second`` is over those after it."""
    back = {new: name for name, new in layers.names(first["layers"]).items()} if "layers" in first else {}
    flat = {path: np.array(flags) for path, flags in tree.flatten(first).items()}
    for path, flags in tree.flatten(second).items():
        kind, _, name = path.partition("/")
        path = f"{kind}/{back.get(name, name)}" if name else kind
        if path in flat:
            flat[path][flat[path]] = flags
        else:
            flat[path] = np.asarray(flags)
    stay = layers.names(flat["layers"]) if "layers" in flat else None
    return tree.unflatten(
        {path: flags for path, flags in flat.items() if stay is None or path in KINDS or path.partition("/")[2] in stay}
    )
