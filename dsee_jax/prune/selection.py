"""The choice of the units that stay, of every kind, by their scores."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import models, stacks, tree
from dsee_jax.config import Scope, ScoreName
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model
from dsee_jax.ops.topk import top_k
from dsee_jax.prune import compaction, units
from dsee_jax.prune.layers import depth, renumbered
from dsee_jax.prune.scores import Evidence, complete, divided
from dsee_jax.runtime import multihost
from dsee_jax.typing import Cuts, Params, Tree, Units

_KEYS = {"layers": 2, "hidden": 3}
"""The numbers that a key is folded with; `units.structured` has those below."""


def select(
    model: Model,
    params: Params,
    adapter: Adapter | None,
    *,
    heads: int | float = 0,
    neurons: int | float = 0,
    layers: int | float = 0,
    hidden: int | float = 0,
    score: ScoreName | Tree = "WABS",
    scope: Scope = "global",
    **evidence: Unpack[Evidence],
) -> dict[str, Any]:
    """Return the kept units of a model without its lowest-scoring units, for `dsee_jax.compact` and `dsee_jax.prune.masked`.

    The kinds are chosen in turn, each among the units that are left: layers, then heads and neurons, then hidden
    dimensions.

    The score of a layer is the sum of the scores of its heads and of its neurons, each divided by their sum over all layers,
    since a score of the update alone may have updates of one kind only. First and last layers compete as all others do. The
    score of a hidden dimension is the sum of the scores of the weights that read or write it in the kernels of all layers.

    Args:
      model: as from `load_pretrained`.
      params, adapter: its weights and their updates, as for `unstructured`.
      heads, neurons, scope: as for `structured`, which chooses them.
      layers: the layers to drop: a fraction in [0, 1), rounded to the nearest whole number, or a whole number (an int).
      hidden: the dimensions of the hidden state to prune, likewise: the width of the model.
      score: a name in `UNIT_SCORES`; or a tree of scores (see `dsee_jax.prune.units`) with the kinds that are pruned.
      **evidence: ``key`` for ``random``, which draws one number per unit; see `dsee_jax.prune.scores.Evidence`.

    Returns:
      The tree of kept units, bool, True = kept; on the host. Kinds whose amount is 0 are absent. Of units with equal scores
      those of the lowest index are kept.

    Raises:
      InputError: as `structured`; or no layer or no hidden dimension would be left, or a layer depends on its number.
    """
    arrays = complete("select", evidence)
    key = arrays.pop("key")
    for name in (name for name, value in arrays.items() if value is not None):
        raise InputError(f"{name} are of scores that have no sum over units: leave them out")
    kept: dict[str, Any] = {}
    if layers:
        kept["layers"] = _layers(model, params, adapter, layers, score, key)
        if not isinstance(score, str):
            score = _cut_scores(score, kept)
        model, params, adapter = _cut(model, params, adapter, kept)
    if heads or neurons:
        cuts = models.cuts(model)
        options: dict[str, Any] = {"heads": heads, "neurons": neurons, "score": score, "scope": scope, **evidence}
        new = units.kept(params, cuts, units.structured(params, adapter, cuts, **options))
        kept = compaction.composed(kept, new)
        model, params, adapter = _cut(model, params, adapter, new) if hidden else (model, params, adapter)
    if hidden:
        kept["hidden"] = _hidden(model, params, adapter, hidden, score, key)
    return kept


def _cut(
    model: Model, params: Params, adapter: Adapter | None, kept: dict[str, Any]
) -> tuple[Model, Params, Adapter | None]:
    """Return a model, its params and its updates with the kept units alone."""
    deltas, supports = ({}, {}) if adapter is None else (adapter.deltas, adapter.supports)
    table = compaction.indices(model, kept, deltas, supports)
    if adapter is not None:
        deltas = compaction.cut_tree({"deltas": deltas}, table)["deltas"]
        supports = compaction.cut_supports(supports, table)
        # The scale is of all ranks; a layer under a new number may have another rank than the layer before it.
        adapter = adapter.replace(deltas=deltas, supports=supports, scale=adapter.scale)
    return compaction.resized(model, kept), compaction.cut_tree({"params": params}, table)["params"], adapter


def _cut_scores(scores: Tree, kept: dict[str, Any]) -> dict[str, Any]:
    """Return a tree of scores for the layers that are left."""
    return {kind: part for kind, part in scores.items() if kind not in ("heads", "neurons")} | renumbered(
        {**scores, "layers": kept["layers"]}
    )


def _layers(
    model: Model, params: Params, adapter: Adapter | None, amount: int | float, score: ScoreName | Tree, key: Any
) -> np.ndarray:
    """Return the flags of the layers that stay, bool (layers,)."""
    cuts = models.cuts(model)
    total = depth(model.config)
    units.partial_removal_count("layers", amount, total, "layers")
    if isinstance(score, str):
        scored = _layer_scores(
            params, adapter, cuts, score, None if key is None else jax.random.fold_in(key, _KEYS["layers"])
        )
        have = np.any([units.have_updates(by_layer, adapter) for by_layer in cuts.values()], axis=0)
        pools = divided(range(total), have.__getitem__, score)
    else:
        scored, pools = _own_scores(score, "layers", total), [list(range(total))]
    left = units.remaining("layers", amount, [len(pool) for pool in pools], apart=False)
    flags = np.zeros(total, bool)
    for pool, count in zip(pools, left, strict=True):
        flags[pool] = multihost.to_host(top_k(scored[np.asarray(pool)], count))
    return flags


def _layer_scores(params: Params, adapter: Adapter | None, cuts: Cuts, score: str, key: Any) -> jax.Array:
    """Return the score of every layer, float32 (layers,)."""
    total = jnp.zeros(len(cuts["heads"]))
    if score == "random" and key is not None:
        return jax.random.uniform(key, total.shape)
    for by_layer in cuts.values():
        sums = jnp.stack([jnp.sum(each) for each in units.scores(params, adapter, by_layer, score, key=key)])
        total += sums / jnp.maximum(jnp.sum(sums), jnp.finfo(jnp.float32).tiny)
    return total


def _hidden(
    model: Model, params: Params, adapter: Adapter | None, amount: int | float, score: ScoreName | Tree, key: Any
) -> np.ndarray:
    """Return the flags of the hidden dimensions that stay, bool (width,)."""
    width = model.config.hidden_size
    left = width - units.partial_removal_count("hidden", amount, width, "hidden dimensions")
    if not isinstance(score, str):
        return multihost.to_host(top_k(_own_scores(score, "hidden", width), left))
    return multihost.to_host(top_k(hidden_scores(model, params, adapter, score, key), left))


def hidden_scores(model: Model, params: Params, adapter: Adapter | None, score: str, key: Any = None) -> jax.Array:
    """Return the scores of the hidden dimensions as `select` compares them, float32 (width,); arguments as of `select`."""
    axes = {
        path: (axis, 1)
        for path, (axis, *_) in models.hidden_axes(model).items()
        if path.endswith("/kernel") and stacks.place(path)[1] is not None
    }
    folded = None if key is None else jax.random.fold_in(key, _KEYS["hidden"])
    (scored,) = units.scores(params, adapter, [Units(axes, tuple(axes))], score, key=folded)
    return scored


def _own_scores(scores: Tree, kind: str, total: int) -> jax.Array:
    """Return the scores of a kind of the whole model from a tree, float32 (total,)."""
    array = jnp.asarray(tree.flatten(scores).get(kind, np.zeros(0)), jnp.float32)
    if array.shape != (total,):
        raise InputError(
            f"the given scores of {kind} have the shape {array.shape}; the model has {total}: give one score per unit"
        )
    return array
