"""Attention heads and feed-forward neurons: what of the params is one unit, how much each matters, which are kept.

A unit is a block of entries on one axis of several params that make sense together only: a head's columns of query, key and
value and its rows of the attention output, a neuron's column of the first feed-forward kernel and its row of the second.
Which they are is data that every architecture brings (`dsee_jax.models.cuts`).

The units kept are a tree of bools, True = kept: ``{"heads": {"layer_0": (heads,), ...}, "neurons": {...}}``. A kind or a
layer that is absent is whole.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import deltas as delta_trees
from dsee_jax import processes, tree
from dsee_jax.aliases import Array, Delta, Deltas, Key, Masks, Params, Supports
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.scores import READS_UPDATE, SCORES


class Units(NamedTuple):
    """The units of one kind in one layer."""

    axes: Mapping[
        str, tuple[int, int]
    ]  # path of a param -> (axis, entries of a unit on it); units in one order everywhere
    scored: tuple[str, ...]  # kernels (in, out) whose columns of a unit make its score


Cuts: TypeAlias = Mapping[str, Sequence[Units]]
"""By kind (``heads``, ``neurons``), for every layer in order."""

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
    updates, coordinates = delta_trees.kernels(deltas), tree.flatten(supports or {})
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
                total = total + processes.whole(columns).reshape(-1, entries).sum(1)
        found.append(total)
    return found


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _columns(
    w: Array, delta: Delta | None, support: Array | None, score: str, scale: float, scale_sparse: bool
) -> jax.Array:
    low_rank, update = delta_trees.updates(w, delta, support, scale=scale, scale_sparse=scale_sparse)
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
    mask = np.moveaxis(processes.whole(mask), axis, 0)
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
