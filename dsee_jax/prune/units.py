"""Structured pruning: scores of heads and neurons, the ones that stay, and masks of everything that is cut with them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import models, tree
from dsee_jax.config import PruneConfig
from dsee_jax.deltas import fold
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.ops.topk import top_k
from dsee_jax.prune.scores import READS_UPDATE, SCORES
from dsee_jax.runtime import multihost
from dsee_jax.typing import Array, Cuts, Delta, Deltas, Key, Masks, Params, Supports, Tree, Units


def structured(
    params: Params,
    deltas: Deltas | None,
    supports: Supports | None,
    cuts: Cuts,
    *,
    heads: int | float = 0,
    neurons: int | float = 0,
    score: str | Tree = "WABS",
    scope: str = "tensor",
    scale: float = 2.0,
    scale_sparse: bool = True,
    key: Key | None = None,
) -> dict[str, Any]:
    """Return masks without the lowest-scoring heads and neurons: whole units, which `dsee_jax.compact` then cuts out.

    Args:
      params, deltas, supports: the weights, the updates and their coordinates, as for `unstructured`.
      cuts: ``dsee_jax.models.cuts(model)``: what makes a unit.
      heads: how many go: a fraction in [0, 1), of which the nearest whole number is taken, or a whole number (an int).
      neurons: the same of feed-forward neurons.
      score: a name in `dsee_jax.prune.units.UNIT_SCORES`, summed over a unit, or given scores, a tree of the form that
        `dsee_jax.prune.units` gives units: ``{"heads": {"layer_0": (heads,), ...}, ...}``. The lowest go.
      scope: ``tensor`` counts and compares within each layer, ``global`` over all layers together, which may then differ.
      scale: alpha / rank of the updates.
      scale_sparse: whether S is scaled too.
      key: for ``random``.

    Returns:
      Bool masks of the kernels and biases that are cut; none of a kind of which nothing goes. True = kept; of equal scores
      the lowest layer and index are kept. `masks.apply` gives the masked model of full shape.

    Raises:
      InputError: a fraction outside [0, 1), a count of more than there are, another kind, score or scope.
    """
    if scope not in ("global", "tensor"):
        raise InputError(f"scope is {scope!r}: use 'global' or 'tensor'")
    kept: dict[str, dict[str, Array]] = {}
    for number, (kind, amount) in enumerate((("heads", heads), ("neurons", neurons))):
        if not amount:
            continue
        if kind not in cuts:
            raise InputError(f"{kind} is {amount} and this architecture has only {', '.join(cuts)} to cut")
        if isinstance(score, str):
            folded = None if key is None else jax.random.fold_in(key, number)
            options = {"scale": scale, "scale_sparse": scale_sparse, "key": folded}
            found = scores(params, deltas, supports, cuts[kind], score, **options)
        else:
            found = _given(params, score, kind, cuts[kind])
        pools = [found] if scope == "global" else [[one] for one in found]
        flags = [flag for pool in pools for flag in _highest_units(kind, amount, pool)]
        kept[kind] = {layer(number): flag for number, flag in enumerate(flags) if flag.size}
    return masks(params, cuts, kept)


def _given(params: Params, score: Tree, kind: str, layers: Sequence[Units]) -> list[np.ndarray]:
    flat, nothing = tree.flatten(score), np.zeros(0)
    found = [np.asarray(flat.get(f"{kind}/{layer(number)}", nothing), np.float32) for number in range(len(layers))]
    shapes, expected = [one.shape for one in found], [(count(params, units),) for units in layers]
    if shapes != expected:
        raise InputError(
            f"the given scores of {kind} have the shapes {shapes}; the layers have {expected}: give one a unit"
        )
    return found


def _highest_units(kind: str, amount: int | float, scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Flags of the units that stay, a layer each; ``amount`` is of all layers together."""
    total = sum(len(one) for one in scores)
    left = total - going(kind, amount, total)
    flags = np.asarray(top_k(np.concatenate(scores), left)) if total else np.zeros(0, bool)
    return np.split(flags, np.cumsum([len(one) for one in scores])[:-1])


def going(kind: str, amount: int | float, total: int) -> int:
    """Return how many of ``total`` units of ``kind`` go: an int as it is, a float as a fraction in [0, 1).

    Raises:
      InputError: a fraction out of range or a count of more than there are; the message begins with ``kind``.
    """
    if isinstance(amount, int):
        if not 0 <= amount <= total:
            raise InputError(f"{kind} is {amount} and there are {total} to compare: use a count of 0 to {total}")
        return amount
    if not 0 <= amount < 1:
        raise InputError(f"{kind} is {amount}; expected a fraction in [0, 1) or a whole number: 1.0 leaves none")
    return round(amount * total)


def check_units(model: Any, params: Params, prunable: list[str], pruning: PruneConfig) -> None:
    """The same for heads and neurons."""
    flat = tree.flatten(params)
    for kind, layers in models.cuts(model).items():
        amount = getattr(pruning, kind)
        counts = [count(params, each) for each in layers]
        # EarlyBERT compares heads within a layer and neurons over the model (arXiv 2101.00063, section 3.2).
        together = kind == "neurons" if pruning.kind == "earlybert" else pruning.scope == "global"
        for total in [sum(counts)] if together else counts:
            going(f"prune.{kind}", amount, total)
        for path in (path for each in layers for path in each.axes if amount and path.endswith("/kernel")):
            if path in flat and path not in prunable:
                raise InputError(
                    f"prune.{kind} is {amount} and prune.targets leaves out {path!r}, which goes with them"
                )


UNIT_SCORES = tuple(name for name in SCORES if not name.startswith("N") and name != "WANDA")
"""The scores of `SCORES` that may be summed over a unit: all but the inverse ones, and the one that reads data."""


def layer(number: int) -> str:
    """Return the name of a layer in the tree of kept units."""
    return f"layer_{number}"


def count(params: Params, units: Units) -> int:
    """Return how many units a layer of ``params`` has; 0 where they were all cut and their params are gone.

    Raises:
      InputError: an axis is not made of whole units, or the params of a layer disagree.
    """
    flat, found = tree.flatten(params), {}
    for path, (axis, entries) in units.axes.items():
        size = flat[path].shape[axis] if path in flat else 0
        if size % entries:
            raise InputError(f"{path!r} has {size} entries on axis {axis}; units of {entries} do not divide it")
        found[path] = size // entries
    most, least = max(found, key=lambda path: found[path]), min(found, key=lambda path: found[path])
    if found[most] != found[least]:
        raise InputError(f"{most!r} has {found[most]} units and {least!r} {found[least]}: they are cut together")
    return found[most]


def scores(
    params: Params,
    deltas: Deltas | None,
    supports: Supports | None,
    layers: Sequence[Units],
    score: str,
    *,
    scale: float = 2.0,
    scale_sparse: bool = True,
    key: Key | None = None,
) -> list[np.ndarray]:
    """Return the score of every unit of one kind, float32 (units,) a layer: a weight's score summed over its scored columns.

    With the update D = scale * (A @ B + S): ``W`` sums |W|, ``WABS`` |W + D|, ``ABS`` |D| (DSEE, arXiv 2111.00160, section
    3.3, structured). A kernel without an update has D = 0; where no scored kernel of the kind has one, the score is ``W``
    (but for ``random``).

    Raises:
      InputError: the score has another name, or ``random`` gets no key.
    """
    if score not in UNIT_SCORES:
        raise InputError(f"score is {score!r}{did_you_mean(score, UNIT_SCORES)}: use one of {', '.join(UNIT_SCORES)}")
    if score == "random" and key is None:
        raise InputError("the score 'random' needs a key: pass key=jax.random.key(seed)")
    updates, coordinates = fold.kernels(deltas), tree.flatten(supports or {})
    if score in READS_UPDATE and not any(path in updates for units in layers for path in units.scored):
        score = "W"
    found = []
    for number, units in enumerate(layers):
        total = np.zeros(count(params, units), np.float32)
        if not len(total):
            pass
        elif score == "random" and key is not None:
            total = np.asarray(jax.random.uniform(jax.random.fold_in(key, number), total.shape))
        else:
            for path in units.scored:
                entries = units.axes[path][1]
                w, delta = tree.get(params, path), updates.get(path)
                columns = _columns(w, delta, coordinates.get(path), score, scale, scale_sparse)
                total = total + multihost.to_host(columns).reshape(-1, entries).sum(1)
        found.append(total)
    return found


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _columns(
    w: Array, delta: Delta | None, support: Array | None, score: str, scale: float, scale_sparse: bool
) -> jax.Array:
    low_rank, update = fold.updates(w, delta, support, scale=scale, scale_sparse=scale_sparse)
    return jnp.sum(SCORES[score](w, low_rank, update), axis=0)


def masks(params: Params, cuts: Cuts, kept: Masks) -> dict[str, jax.Array]:
    """Return bool masks, shaped like their params, of all that is cut together with the units that are not in ``kept``."""
    found: dict[str, jax.Array] = {}
    for kind, layers in kept.items():
        for number, units in enumerate(cuts[kind]):
            if layer(number) not in layers:
                continue
            for path, (axis, entries) in units.axes.items():
                shape = tree.get(params, path).shape
                along = jnp.repeat(jnp.asarray(layers[layer(number)]), entries)
                wide = along.reshape([-1 if place == axis else 1 for place in range(len(shape))])
                found[path] = jnp.broadcast_to(wide, shape)
    return tree.unflatten(found)


def kept(params: Params, cuts: Cuts, masks: Masks) -> dict[str, dict[str, np.ndarray]]:
    """Return the units that ``masks`` keep, the inverse of `masks`.

    Raises:
      InputError: a mask cuts anything but whole units, or not all of what goes with them; the message names its path.
    """
    flat, found = tree.flatten(masks), {}
    for kind, layers in cuts.items():
        for number, units in enumerate(layers):
            present = [path for path in units.axes if path in flat]
            if not present:
                continue
            alike = {path: _along(path, flat.pop(path), *units.axes[path]) for path in present}
            one = alike[present[0]]
            for path in units.axes:
                if path not in alike or not np.array_equal(alike[path], one):
                    why = "has another one" if path in alike else "has none"
                    raise InputError(
                        f"the mask of {present[0]!r} cuts {kind} and {path!r} {why}: draw masks with prune.structured"
                    )
            if len(one) != (there := count(params, units)):
                raise InputError(f"the mask of {present[0]!r} is of {len(one)} {kind}; the model has {there} there")
            found.setdefault(kind, {})[layer(number)] = one
    for path in flat:
        raise InputError(f"the mask of {path!r} is none of {' or '.join(cuts)}: only these can be cut out")
    return found


def _along(path: str, mask: Any, axis: int, entries: int) -> np.ndarray:
    mask = np.moveaxis(multihost.to_host(mask), axis, 0)
    if len(mask) % entries:
        raise InputError(
            f"the mask of {path!r} has {len(mask)} entries on axis {axis}; units of {entries} do not divide it"
        )
    blocks = mask.reshape(len(mask) // entries, -1)
    whole = blocks.all(1)
    if (blocks.any(1) != whole).any():
        raise InputError(
            f"the mask of {path!r} cuts unit {int((blocks.any(1) != whole).argmax())} in part: cut all or none"
        )
    return whole
