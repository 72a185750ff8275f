"""Units of structured pruning: the scores of heads and neurons, the kept units, and the masks of their params.

A unit is an attention head, a feed-forward neuron, a layer, or a dimension of the hidden state of the residual stream. The
kept units of a model are a tree of bool arrays, True = kept::

    {"heads": {"layer_0": (heads,), ...}, "neurons": {"layer_0": (neurons,), ...}, "layers": (layers,), "hidden": (width,)}

In a layer or kind that is absent every unit is kept. Heads and neurons of layers that are dropped are left out. Layers have
their numbers before the pruning. Trees of scores have the same form, and those of coefficients that of heads and neurons.

Masks of params (`masks`) describe heads and neurons alone: zeros in a layer do not make it pass its input on, and the norms
of a residual stream with zeros count them.
"""

import functools
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import models, orientation, stacks, tree
from dsee_jax.config import PruneConfig, Scope, ScoreName
from dsee_jax.deltas import fold
from dsee_jax.deltas.adapter import Adapter, Update, kernels, updates_of
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.models import hf_config
from dsee_jax.models.architecture import Model, ModelConfig
from dsee_jax.ops.topk import top_k
from dsee_jax.prune.layers import depth, layer
from dsee_jax.prune.scores import SCORES, Evidence, check_low_rank, complete, divided
from dsee_jax.runtime import multihost
from dsee_jax.typing import Array, Cuts, Delta, Masks, Params, Tree, Units

log = logging.getLogger(__name__)


def structured(
    params: Params,
    adapter: Adapter | None,
    cuts: Cuts,
    *,
    heads: int | float = 0,
    neurons: int | float = 0,
    score: ScoreName | Tree = "WABS",
    scope: Scope = "global",
    **evidence: Unpack[Evidence],
) -> dict[str, Any]:
    """Return masks without the lowest-scoring heads and neurons; `dsee_jax.compact` removes these units from the arrays.

    Args:
      params, adapter: the weights and their updates, as for `unstructured`.
      cuts: ``dsee_jax.models.cuts(model)``, the params of every unit.
      heads: the heads to prune: a fraction in [0, 1), rounded to the nearest whole number, or a whole number (an int).
      neurons: the feed-forward neurons to prune, likewise.
      score: a name in `UNIT_SCORES`, summed over the columns of a unit; or a tree of scores (see above). The lowest go.
      scope: ``global`` counts and compares over all layers, which may then differ in width; ``tensor`` within each layer. For
        a score of the update alone, the layers with an update and those without are compared apart, and each lose their
        share.
      **evidence: ``key`` for ``random``; see `dsee_jax.prune.scores.Evidence`.

    The function works under ``jax.jit`` and on sharded arrays; ``heads`` and ``neurons`` are Python numbers there too.

    Returns:
      Bool masks of all kernels and biases that hold heads, where ``heads`` is not 0, and neurons, likewise. True = kept. Of
      units with equal scores those of the lowest layer and index are kept. `dsee_jax.masks.apply` gives the masked model
      of full shape.

    Raises:
      InputError: a fraction outside [0, 1), a number larger than the number of units, an array in its place, or an unknown
        kind, score or scope.
    """
    arrays = complete("structured", evidence)
    key = arrays.pop("key")
    updates_of(adapter)
    if not isinstance(cuts, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"cuts is of the type {type(cuts).__name__}; expected a mapping: pass dsee_jax.models.cuts(model)"
        )
    for name in (name for name, value in arrays.items() if value is not None):
        raise InputError(f"{name} are of scores that have no sum over heads and neurons: leave them out")
    if scope not in ("global", "tensor"):
        raise InputError(f"scope is {scope!r}: use 'global' or 'tensor'")
    kept: dict[str, dict[str, Array]] = {}
    for number, (kind, amount) in enumerate((("heads", heads), ("neurons", neurons))):
        if isinstance(amount, jax.Array):
            raise InputError(
                f"{kind} is a JAX array; expected a Python number: the number of units to prune is fixed in a compiled program"
            )
        if not amount:
            continue
        if kind not in cuts:
            raise InputError(f"{kind} is {amount} and this architecture has only {', '.join(cuts)} to cut")
        if isinstance(score, str):
            folded = None if key is None else jax.random.fold_in(key, number)
            by_layer = scores(params, adapter, cuts[kind], score, key=folded)
        else:
            by_layer = _layer_scores(params, score, kind, cuts[kind])
        numbers = range(len(by_layer))
        if scope == "tensor":
            pools = [[number] for number in numbers]
        elif isinstance(score, str):
            pools = divided(numbers, have_updates(cuts[kind], adapter).__getitem__, score)
        else:
            pools = [list(numbers)]
        sizes = [sum(len(by_layer[number]) for number in pool) for pool in pools]
        flags: dict[int, jax.Array] = {}
        for pool, left in zip(pools, remaining(kind, amount, sizes, apart=scope == "tensor"), strict=True):
            flags |= zip(pool, keep_highest([by_layer[number] for number in pool], left), strict=True)
        kept[kind] = {layer(number): flags[number] for number in numbers if flags[number].size}
    return masks(params, cuts, kept)


def by_kind(
    params: Params, adapter: Adapter | None, cuts: Cuts, score: str, **evidence: Unpack[Evidence]
) -> dict[str, dict[str, jax.Array]]:
    """Return the tree of the `scores` of all kinds, as `structured` compares them; layers without units are left out."""
    key = complete("by_kind", evidence)["key"]
    result: dict[str, dict[str, jax.Array]] = {}
    for number, (kind, layers) in enumerate(cuts.items()):
        folded = None if key is None else jax.random.fold_in(key, number)
        each = scores(params, adapter, layers, score, key=folded)
        result[kind] = {layer(place): values for place, values in enumerate(each) if values.size}
    return result


def _layer_scores(params: Params, score: Tree, kind: str, layers: Sequence[Units]) -> list[jax.Array]:
    """Return the scores of one kind from a tree, float32 (units,) for each layer."""
    flat, nothing = tree.flatten(score), np.zeros(0)
    by_layer = [jnp.asarray(flat.get(f"{kind}/{layer(number)}", nothing), jnp.float32) for number in range(len(layers))]
    shapes, expected = [each.shape for each in by_layer], [(count(params, units),) for units in layers]
    if shapes != expected:
        raise InputError(
            f"the given scores of {kind} have the shapes {shapes}; the layers have {expected}: give one score per unit"
        )
    return by_layer


def remaining(kind: str, amount: int | float, sizes: Sequence[int], *, apart: bool) -> list[int]:
    """Return the number of units to keep of each pool; ``amount`` is of each pool, or of all with their shares."""
    if apart:
        return [size - removal_count(kind, amount, size) for size in sizes]
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    removed = [round(removal_count(kind, amount, ends[-1]) * end / max(ends[-1], 1)) for end in ends]
    return [size - (end - start) for size, start, end in zip(sizes, [0, *removed], removed, strict=False)]


def keep_highest(scores: Sequence[jax.Array], left: int) -> list[jax.Array]:
    """Return the ``left`` units of the highest scores of all layers in ``scores``, by layer."""
    flags = top_k(jnp.concatenate(scores), left)
    return jnp.split(flags, np.cumsum([len(each) for each in scores])[:-1])


def have_updates(layers: Sequence[Units], adapter: Adapter | None) -> list[bool]:
    """Return for each layer whether any of its scored kernels has an update."""
    updates = kernels(None if adapter is None else adapter.deltas)
    return [any(path in updates for path in units.scored) for units in layers]


def removal_count(kind: str, amount: int | float, total: int) -> int:
    """Return the number of units to prune of ``total``: an int as it is, a float as a fraction in [0, 1).

    Raises:
      InputError: a fraction out of range or a number above ``total``; the message begins with ``kind``.
    """
    if isinstance(amount, str) or not hasattr(amount, "__round__"):
        raise InputError(f"{kind} is {amount!r}; expected a fraction in [0, 1) or a whole number")
    if isinstance(amount, (int, np.integer)):
        if not 0 <= amount <= total:
            raise InputError(f"{kind} is {amount} and there are {total} to compare: use a count of 0 to {total}")
        return int(amount)
    if not 0 <= amount < 1:
        raise InputError(f"{kind} is {amount}; expected a fraction in [0, 1) or a whole number: 1.0 leaves none")
    return round(amount * total)


def check_units(model: Model, params: Params, prunable: list[str], pruning: PruneConfig) -> None:
    """Raise `InputError` if `select` or EarlyBERT would refuse the config's units after the stage tune.

    ``prunable`` are the paths that ``prune.targets`` matches.
    """
    flat, total = tree.flatten(params), depth(model.config)
    stay = total - partial_removal_count("prune.layers", pruning.layers, total, "layers")
    if stay < total or pruning.target.layers:  # a target drops any layers
        model.config.with_layers([number < min(stay, max(total - 1, 1)) for number in range(total)])
        _check_prunable("layers", pruning, prunable, [path for path in flat if stacks.place(path)[1] is not None])
    width, left = model.config.hidden_size, dict[str, int]()
    narrow = width - partial_removal_count("prune.hidden", pruning.hidden, width, "hidden dimensions")
    if narrow < width or pruning.target.hidden:
        _check_prunable("hidden", pruning, prunable, [path for path in flat if stacks.place(path)[1] is not None])
    for kind, layers in models.cuts(model).items():
        amount = getattr(pruning, kind)
        counts = [count(params, units) for units in layers]
        if pruning.uniform and len(set(counts)) > 1:
            raise InputError(
                f"prune.uniform is true and the layers have {shorten(str(counts))} {kind}: start from a model whose layers "
                "have equal numbers, or set it to false"
            )
        if stay < total:
            counts = sorted(counts)[
                :stay
            ]  # which layers stay is not known yet: a number of units must be right for any
        # EarlyBERT compares heads within a layer and neurons over the model (arXiv 2101.00063, section 3.2).
        over_all_layers = kind == "neurons" if pruning.kind == "earlybert" else pruning.scope == "global"
        for size in [sum(counts)] if over_all_layers and not pruning.uniform else counts:
            removal_count(f"prune.{kind}", amount, size)
        if amount or pruning.target.kind:
            _check_prunable(kind, pruning, prunable, [path for units in layers for path in units.axes if path in flat])
        left[kind] = counts[0] - (removal_count(kind, amount, counts[0]) if pruning.uniform else 0)
        if pruning.uniform and amount and narrow == width:
            warn_unless_standard(model.config, kind, left[kind])
    if pruning.uniform and narrow < width:
        _check_width(model.config, narrow, left)


def partial_removal_count(kind: str, amount: int | float, total: int, words: str) -> int:
    """Return `removal_count`; raises `InputError` where none of the ``total`` units, called ``words``, would be left."""
    removed = removal_count(kind, amount, total)
    if removed == total:
        raise InputError(f"{kind} is {amount}: all {total} {words} of the model would go; keep one or more")
    return removed


def _check_prunable(kind: str, pruning: PruneConfig, prunable: Container[str], paths: Iterable[str]) -> None:
    """Raise `InputError` unless ``prunable`` has all kernels among ``paths``, which lose entries with the units of a kind."""
    for path in paths:
        if path.endswith("/kernel") and path not in prunable:
            lost = "may go with its layer" if kind == "layers" else "loses rows or columns"
            target = pruning.target
            chosen = (
                f"target.{target.kind} is {target.budget}" if target.kind else f"{kind} is {getattr(pruning, kind)}"
            )
            raise InputError(f"prune.{chosen} and prune.targets leaves out {path!r}, which {lost}")


def standard(config: ModelConfig, kind: str, number: int) -> bool:
    """Return whether the standard fields of a config can hold ``number`` units of a kind in every layer.

    Fields for the number of heads may also fix the size of a head; the heads then have to fill the hidden width.
    """
    widths = {**config.widths, kind: (number,) * len(config.widths[kind])}
    fields = {kind, "hidden"} if kind == "heads" else {kind}
    return fields.isdisjoint(hf_config.kept_kinds(config.with_widths(**widths)))


def warn_unless_standard(config: ModelConfig, kind: str, left: int) -> None:
    """Warn if the standard fields of a config cannot hold ``left`` units in every layer."""
    if not standard(config, kind, left):
        widths = range(config.widths[kind][0], 0, -1)
        others = [str(number) for number in widths if standard(config, kind, number)]
        log.warning(
            "prune.uniform: the fields of %s in config.json cannot hold %s of its %s %s (they can hold %s): only this library "
            "will open model/, and export --format hf writes zeros for the others",
            *(config.model_type, left, config.widths[kind][0], kind, shorten(", ".join(others))),
        )


def _check_width(config: ModelConfig, width: int, left: Mapping[str, int]) -> None:
    """Raise `InputError` if the standard fields of a config cannot hold a width with ``left`` units in every layer."""

    def standard(size: int) -> bool:
        widths = {kind: (number,) * depth(config) for kind, number in left.items()}
        return not hf_config.kept_kinds(config.with_hidden(size).with_widths(**widths))

    if not standard(width):
        others = [str(size) for size in range(config.hidden_size, 0, -1) if standard(size)]
        raise InputError(
            f"prune.uniform is true and prune.hidden leaves a width of {width}, which the fields of {config.model_type} in "
            f"config.json cannot hold with {left['heads']} heads of {config.head_size} entries (they can hold "
            f"{shorten(', '.join(others)) or 'none'}): prune heads in proportion, or set it to false"
        )


UNIT_SCORES = tuple(name for name, score in SCORES.items() if score.of_units)
"""The scores that may be summed over the weights of a unit."""


def count(params: Params, units: Units) -> int:
    """Return the number of units in a layer of ``params``; 0 where none is left and their params are absent.

    Raises:
      InputError: the size of an axis is no multiple of the entries of a unit, or the params of a layer disagree.
    """
    flat, counts = tree.flatten(params), {}
    for path, (axis, entries) in units.axes.items():
        size = flat[path].shape[axis] if path in flat else 0
        if size % entries:
            raise InputError(f"{path!r} has {size} entries on axis {axis}; units of {entries} do not divide it")
        counts[path] = size // entries
    most, least = max(counts, key=lambda path: counts[path]), min(counts, key=lambda path: counts[path])
    if counts[most] != counts[least]:
        raise InputError(
            f"{most!r} has {counts[most]} units and {least!r} {counts[least]}: params of one layer hold the same units"
        )
    return counts[most]


def scores(
    params: Params,
    adapter: Adapter | None,
    layers: Sequence[Units],
    score: str,
    **evidence: Unpack[Evidence],
) -> list[jax.Array]:
    """Return the scores of all units of one kind, float32 (units,) for each layer; ``evidence`` is that of `structured`.

    The score of a unit is the sum of the scores of the weights in its scored columns (DSEE, arXiv 2111.00160, section 3.3,
    structured). A kernel without an update has D = 0. In a layer without an update of any scored kernel, a score of the update
    alone becomes ``W``. ``random`` draws one number per unit.

    Raises:
      InputError: the score is not in `UNIT_SCORES`; ``random`` has no key; or a score of the update alone meets an update of
        sparse values alone, where units that no value lies in would all score 0.
    """
    if score not in UNIT_SCORES:
        raise InputError(f"score is {score!r}{did_you_mean(score, UNIT_SCORES)}: use one of {', '.join(UNIT_SCORES)}")
    key = complete("scores", evidence)["key"]
    if "key" in SCORES[score].reads and key is None:
        raise InputError("the score 'random' needs a key: pass key=jax.random.key(seed)")
    updates = updates_of(adapter)
    scale, scale_sparse = (1.0, True) if adapter is None else (adapter.scale, adapter.scale_sparse)
    flat, by_layer = tree.flatten(params), []
    for number, (units, updated) in enumerate(zip(layers, have_updates(layers, adapter), strict=True)):
        own = score if updated or not SCORES[score].of_update else "W"
        size = count(params, units)
        if not size:
            by_layer.append(jnp.zeros(0))
        elif "key" in SCORES[score].reads and key is not None:
            by_layer.append(jax.random.uniform(jax.random.fold_in(key, number), (size,)))
        else:
            parts = []
            for path in units.scored:
                w, update = tree.lookup(flat, path), updates.get(path)
                if update is not None:
                    check_low_rank(path, own, update[0])
                parts.append(_unit_scores(path, w, update, scale, own, scale_sparse, *units.axes[path]))
            by_layer.append(functools.reduce(jnp.add, parts))
    return by_layer


def _unit_scores(
    path: str,
    w: Array,
    update: Update | None,
    scale: float | Array,
    score: str,
    scale_sparse: bool,
    axis: int,
    entries: int,
) -> jax.Array:
    """Return the scores (units,) of one kernel, whose units have ``entries`` entries each along ``axis``."""
    if update is None:
        return _columns(w, None, None, scale, score, scale_sparse, None, axis, entries)
    fold.check(path, w.shape, update)
    return _columns(w, update.delta, update.support, scale, score, scale_sparse, update.orientation, axis, entries)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _columns(
    w: Array,
    delta: Delta | None,
    support: Array | None,
    scale: float | Array,
    score: str,
    scale_sparse: bool,
    axes: str | None,
    axis: int,
    entries: int,
) -> jax.Array:
    """Return the scores (units,) of a kernel with the orientation ``axes``; any, without a delta."""
    matrix = w if axes is None else orientation.matrix(w, axes)
    low_rank, update = fold.updates(matrix, delta, support, scale=scale, scale_sparse=scale_sparse)
    scored = SCORES[score](matrix, low_rank, update)
    scored = scored if axes is None else orientation.tensor(scored, w, axes)
    columns = jnp.sum(scored, axis=[other for other in range(w.ndim) if other != axis])
    return jnp.sum(columns.reshape(-1, entries), axis=1)


def masks(params: Params, cuts: Cuts, kept: Masks) -> dict[str, jax.Array]:
    """Return bool masks, shaped like their params, of all params that hold units of ``kept``; True = the unit is kept."""
    weights, flat = tree.flatten(params), dict[str, jax.Array]()
    for kind, layers in kept.items():
        if kind not in cuts:
            raise InputError(f"masks of params cannot describe kept {kind}: use prune.masked, or compact")
        for number, units in enumerate(cuts[kind]):
            if layer(number) not in layers:
                continue
            for path, (axis, entries) in units.axes.items():
                shape = tree.lookup(weights, path).shape
                along = jnp.repeat(jnp.asarray(layers[layer(number)]), entries)
                wide = along.reshape([-1 if place == axis else 1 for place in range(len(shape))])
                flat[path] = jnp.broadcast_to(wide, shape)
    return tree.unflatten(flat)


def kept(params: Params, cuts: Cuts, masks: Masks) -> dict[str, dict[str, np.ndarray]]:
    """Return the kept units of ``masks``; the inverse of `masks`.

    Raises:
      InputError: a mask prunes a part of a unit, or two masks of one layer prune different units; the message names the path.
    """
    flat, units_kept = tree.flatten(masks), {}
    for kind, layers in cuts.items():
        for number, units in enumerate(layers):
            present = [path for path in units.axes if path in flat]
            if not present:
                continue
            by_path = {path: _unit_flags(path, flat.pop(path), *units.axes[path]) for path in present}
            flags = by_path[present[0]]
            for path in units.axes:
                if path not in by_path or not np.array_equal(by_path[path], flags):
                    why = "has a different mask" if path in by_path else "has no mask"
                    raise InputError(
                        f"the mask of {present[0]!r} prunes {kind} and {path!r} {why}: draw masks with prune.structured"
                    )
            if len(flags) != (size := count(params, units)):
                raise InputError(
                    f"the mask of {present[0]!r} is for {len(flags)} {kind}; the layer of the model has {size}"
                )
            units_kept.setdefault(kind, {})[layer(number)] = flags
    for path in flat:
        raise InputError(f"the mask of {path!r} is not of {' or '.join(cuts)}: only these units can be removed")
    return units_kept


def _unit_flags(path: str, mask: Any, axis: int, entries: int) -> np.ndarray:
    """Return the kept units (units,) of the mask of one param."""
    mask = np.moveaxis(multihost.to_host(mask), axis, 0)
    if len(mask) % entries:
        raise InputError(
            f"the mask of {path!r} has {len(mask)} entries on axis {axis}; units of {entries} do not divide it"
        )
    blocks = mask.reshape(len(mask) // entries, -1)
    flags = blocks.all(1)
    if (blocks.any(1) != flags).any():
        raise InputError(
            f"the mask of {path!r} prunes a part of unit {int((blocks.any(1) != flags).argmax())}: prune all of it or nothing"
        )
    return flags
