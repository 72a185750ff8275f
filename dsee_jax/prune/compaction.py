"""Smaller arrays for a model without its pruned heads and neurons, and the way back to the original shapes.

One table of `Indices` cuts every tree of a model: params, masks, updates and the moments of an optimiser. The coordinates of
supports are renumbered. A leaf that would become empty is removed.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import models, tree
from dsee_jax.deltas.adapter import kernels
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model
from dsee_jax.prune.units import kept as kept_units
from dsee_jax.prune.units import layer
from dsee_jax.runtime import multihost
from dsee_jax.typing import Masks, Params, Supports

Indices: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""``{path: {axis: kept indices, int}}``; paths start with ``params/``, ``deltas/`` or ``supports/``."""


def compact(model: Model, params: Params, masks: Masks) -> tuple[Model, dict[str, Any]]:
    """Remove pruned heads and neurons from a model; the result gives the logits of ``masks.apply(params, masks)``.

    `cut_tree` and `cut_supports` cut attached updates. The equal masked model is then
    ``masks.apply(materialize(...), masks)``.

    Args:
      model: as from `load_pretrained`.
      params: the params of the model.
      masks: as from `dsee_jax.prune.structured`. Layers may differ and may lose all of their units.

    Returns:
      ``(small model, small params)``. The config of the small model holds the widths of every layer.

    Raises:
      InputError: a mask prunes a part of a unit, or does not fit the model.
    """
    kept = kept_units(params, models.cuts(model), masks)
    return resized(model, kept), cut_tree({"params": params}, indices(model, kept))["params"]


def resized(model: Model, kept: Masks) -> Model:
    """Return the model without params, in the widths that ``kept`` leaves; a layer that is not in ``kept`` keeps its width."""
    widths = {
        kind: tuple(
            int(np.sum(kept.get(kind, {}).get(layer(number), width)))
            for number, width in enumerate(model.config.widths[kind])
        )
        for kind in model.config.widths
    }
    return model.clone(config=model.config.with_widths(**widths))


def indices(
    model: Model, kept: Masks, deltas: Mapping[str, Any] | None = None, supports: Supports | None = None
) -> Indices:
    """Return the kept indices of all params, updates and supports that hold pruned units.

    Args:
      model: the model before the cut.
      kept: the kept units, True = kept (see `dsee_jax.prune.units`).
      deltas, supports: the updates of the model and their coordinates, or None.

    Raises:
      InputError: ``kept`` has another number of units than the model.
    """
    axes: dict[str, dict[int, np.ndarray]] = {}
    for kind, layers in models.cuts(model).items():
        for number, units in enumerate(layers):
            flags = kept.get(kind, {}).get(layer(number))
            if flags is None:
                continue
            if len(flags) != model.config.widths[kind][number]:
                raise InputError(
                    f"layer {number} has {model.config.widths[kind][number]} {kind} and the kept units are of "
                    f"{len(flags)}: they belong to another model"
                )
            for path, (axis, entries) in units.axes.items():
                axes.setdefault(path, {})[axis] = np.flatnonzero(np.repeat(flags, entries))
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
    return table


def cut_tree(values: Any, indices: Indices) -> Any:
    """Return a pytree with its leaves cut: ``{"params", "deltas"}``, or the state of an optimiser of such a tree.

    The path of a leaf joins the keys of the dicts above it; tuples in between (the states of optax) do not count. A leaf
    without a path in ``indices`` stays as it is. Leaves and dicts that would become empty are removed.
    """
    return _cut(values, indices, "")


def _cut(node: Any, indices: Indices, path: str) -> Any:
    if isinstance(node, Mapping):
        cut = {key: _cut(child, indices, f"{path}/{key}" if path else str(key)) for key, child in node.items()}
        return {key: child for key, child in cut.items() if not path or not _empty(child)}
    if isinstance(node, tuple):
        parts = [_cut(child, indices, path) for child in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    for axis, left in indices.get(path, {}).items():
        node = node.take(left, axis=axis)
    return node


def _empty(node: Any) -> bool:
    return not node if isinstance(node, Mapping) else getattr(node, "size", 1) == 0


def cut_supports(supports: Supports, indices: Indices) -> dict[str, Any]:
    """Return the kept coordinates, renumbered by the kept rows and columns of their kernels."""
    flat = tree.flatten(cut_tree({"supports": supports}, indices)["supports"])
    for path, support in flat.items():
        for axis, left in indices.get(f"params/{path}", {}).items():
            support = jnp.asarray(support).at[:, axis].set(np.searchsorted(left, multihost.to_host(support)[:, axis]))
        flat[path] = support
    return tree.unflatten(flat)


def check(model: Model, kept: Masks) -> None:
    """Raise `InputError` unless ``kept``, over all original units, gives the widths of ``model``; an empty tree passes."""
    for name in {name for layers in kept.values() for name in layers} - {
        layer(number) for widths in model.config.widths.values() for number in range(len(widths))
    }:
        raise InputError(f"the kept units are of {name} and the model has no such layer")
    if (left := resized(_original(model, kept), kept).config.widths) != model.config.widths:
        raise InputError(f"the model has the widths {model.config.widths} and the kept units give {left}")


def _original(model: Model, kept: Masks) -> Model:
    """Return the model without params, in the widths before the pruning that ``kept`` describes."""
    return resized(model, jax.tree.map(np.ones_like, kept))


def expand(model: Model, params: Params, kept: Masks) -> tuple[Model, dict[str, Any]]:
    """Return the model and params in the original shapes, with zeros at the pruned units.

    Args:
      model: the small model.
      params: the params of the small model, updates folded in.
      kept: the kept units over all original units, True = kept. A kind that is left out keeps the shapes of the small model.

    Raises:
      InputError: ``kept`` does not give the widths of the small model.
    """
    check(model, kept)
    full = _original(model, kept)
    table, small = indices(full, kept), tree.flatten(params)
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


def composed(first: Masks, second: Masks) -> dict[str, dict[str, np.ndarray]]:
    """Return the kept units of two cuts in a row, over the units before ``first``; ``second`` is over those after it."""
    kept = {kind: {name: np.array(flags) for name, flags in layers.items()} for kind, layers in first.items()}
    for kind, layers in second.items():
        for name, flags in layers.items():
            if name in kept.setdefault(kind, {}):
                kept[kind][name][kept[kind][name]] = flags
            else:
                kept[kind][name] = np.asarray(flags)
    return kept
