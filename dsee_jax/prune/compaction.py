"""Smaller arrays for what is left of a model when heads and neurons go, and back to the shapes it had.

All trees of a model are cut by one `Plan`, whatever hangs at its paths: params, masks, updates, the moments of an optimiser.
Of supports the coordinates that are left are numbered anew. A leaf of which nothing is left goes, so that no array is empty.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from dsee_jax import models, tree
from dsee_jax.deltas import fold
from dsee_jax.errors import InputError
from dsee_jax.prune.units import kept as kept_units
from dsee_jax.prune.units import layer
from dsee_jax.runtime import multihost
from dsee_jax.typing import Masks, Params, Supports

Plan: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""``{path: {axis: int indices that stay}}``; paths start with ``params/``, ``deltas/`` or ``supports/``."""


def compact(model: Any, params: Params, masks: Masks) -> tuple[Any, dict[str, Any]]:
    """Cut heads and neurons out of a model; the result gives the logits of ``masks.apply(params, masks)``.

    Updates that are attached go with `cut_tree`; the equal masked model is then ``masks.apply(materialize(...), masks)``.

    Args:
      model: as from `load_pretrained`.
      params: its params.
      masks: from `dsee_jax.prune.structured`: whole units only. Layers may differ and may lose all of their units.

    Returns:
      ``(small model, small params)``: the config of the model says the widths of every layer.

    Raises:
      InputError: the masks are not made of whole units, or do not fit the model.
    """
    kept = kept_units(params, models.cuts(model), masks)
    return resized(model, kept), cut_tree({"params": params}, plan(model, kept))["params"]


def resized(model: Any, kept: Masks) -> Any:
    """Return the model without params of the units that stay."""
    widths = {
        kind: tuple(
            int(np.sum(kept.get(kind, {}).get(layer(number), there)))
            for number, there in enumerate(model.config.widths[kind])
        )
        for kind in model.config.widths
    }
    return model.clone(config=model.config.with_widths(**widths))


def plan(model: Any, kept: Masks, deltas: Mapping[str, Any] | None = None, supports: Supports | None = None) -> Plan:
    """Return what `cut_tree` takes, for params, and for updates where they are given."""
    axes: dict[str, dict[int, np.ndarray]] = {}
    for kind, layers in models.cuts(model).items():
        for number, units in enumerate(layers):
            keep = kept.get(kind, {}).get(layer(number))
            if keep is None:
                continue
            if len(keep) != model.config.widths[kind][number]:
                raise InputError(
                    f"layer {number} has {model.config.widths[kind][number]} {kind} and the cut is of {len(keep)}: "
                    "it was made from another model"
                )
            for path, (axis, entries) in units.axes.items():
                axes.setdefault(path, {})[axis] = np.flatnonzero(np.repeat(keep, entries))
    found: dict[str, dict[int, np.ndarray]] = {f"params/{path}": taken for path, taken in axes.items()}
    coordinates = tree.flatten(supports or {})
    for path, delta in fold.kernels(deltas).items():
        if path not in axes:
            continue
        taken = axes[path]
        gone = any(not len(indices) for indices in taken.values())
        nothing = np.zeros(0, np.int64)
        if "a" in delta:
            found[f"deltas/{path}/a"] = {0: nothing} if gone else {k: i for k, i in taken.items() if k == 0}
            found[f"deltas/{path}/b"] = {0: nothing} if gone else {k: i for k, i in taken.items() if k == 1}
        if "values" in delta:
            places = multihost.to_host(coordinates[path])
            stay = np.all([np.isin(places[:, axis], indices) for axis, indices in taken.items()], axis=0)
            found[f"deltas/{path}/values"] = found[f"supports/{path}"] = {0: np.flatnonzero(stay)}
    return found


def cut_tree(values: Any, plan: Plan) -> Any:
    """Return any pytree with its leaves cut: ``{"params", "deltas"}``, or the state of an optimiser of such a tree.

    The keys of the dicts above a leaf, joined, are its path in the plan; tuples in between (the states of optax) do not count.
    A leaf that no path of the plan names stays as it is; one of which nothing is left goes, with the dicts that held only it.
    """
    return _cut(values, plan, "")


def _cut(node: Any, plan: Plan, path: str) -> Any:
    if isinstance(node, Mapping):
        cut = {key: _cut(child, plan, f"{path}/{key}" if path else str(key)) for key, child in node.items()}
        return {key: child for key, child in cut.items() if not path or not _empty(child)}
    if isinstance(node, tuple):
        parts = [_cut(child, plan, path) for child in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    for axis, indices in plan.get(path, {}).items():
        node = node.take(indices, axis=axis)
    return node


def _empty(node: Any) -> bool:
    return not node if isinstance(node, Mapping) else getattr(node, "size", 1) == 0


def cut_supports(supports: Supports, plan: Plan) -> dict[str, Any]:
    """Return the coordinates that are left, by the rows and columns that are left."""
    flat = tree.flatten(cut_tree({"supports": supports}, plan)["supports"])
    for path, places in flat.items():
        for axis, indices in plan.get(f"params/{path}", {}).items():
            places = jnp.asarray(places).at[:, axis].set(np.searchsorted(indices, multihost.to_host(places)[:, axis]))
        flat[path] = places
    return tree.unflatten(flat)


def check(model: Any, kept: Masks) -> None:
    """Raise `InputError` unless ``kept``, of all units before any cut, leaves those of ``model``; {} says nothing."""
    whole = model.clone(config=model.config.with_widths())
    plan(whole, kept)
    for name in {name for layers in kept.values() for name in layers} - {
        layer(number) for widths in whole.config.widths.values() for number in range(len(widths))
    }:
        raise InputError(f"the cut is of {name} and the model has none")
    if kept and (left := resized(whole, kept).config.widths) != model.config.widths:
        raise InputError(f"the model has the widths {model.config.widths} and the cut leaves {left}")


def expand(model: Any, params: Params, kept: Masks) -> tuple[Any, dict[str, Any]]:
    """Return the model and params as they were shaped before the cut ``kept``, zeros in the place of what was cut.

    Args:
      model: the small model.
      params: its params, updates folded in.
      kept: all units there were before any cut, True = kept.

    Raises:
      InputError: ``kept`` is not the cut that made this model.
    """
    check(model, kept)
    whole = model.clone(config=model.config.with_widths())
    cut, small = plan(whole, kept), tree.flatten(params)
    flat = {}
    for path, leaf in tree.flatten(models.shapes(whole)).items():
        axes = cut.get(f"params/{path}")
        if axes is None:
            flat[path] = small[path]
            continue
        flat[path] = dense = np.zeros(leaf.shape, leaf.dtype)
        if path in small:
            dense[np.ix_(*(axes.get(axis, np.arange(size)) for axis, size in enumerate(leaf.shape)))] = small[path]
    return whole, tree.unflatten(flat)


def composed(first: Masks, second: Masks) -> dict[str, dict[str, np.ndarray]]:
    """Return two cuts, one after the other, as one of the first model; ``second`` counts the units that ``first`` left."""
    found = {kind: {name: np.array(keep) for name, keep in layers.items()} for kind, layers in first.items()}
    for kind, layers in second.items():
        for name, keep in layers.items():
            if name in found.setdefault(kind, {}):
                found[kind][name][found[kind][name]] = keep
            else:
                found[kind][name] = np.asarray(keep)
    return found
