"""The cost of a model by the numbers of units that its layers keep, counted from its arrays or read off measured times.

Each function returns the `Costs` that `dsee_jax.prune.budget.choose` reads. The updates of an adapter count as factors that
stay apart: the factor that the cut shortens costs by unit, the other as long as its layer stays. A layer without units has no
such factor either: the costs are then a little too high. Were it saved with the last unit, layers would be emptied for it.

The costs of a model with fewer hidden dimensions are counted on the arrays of the unpruned one, see `Dimensions`: the shapes
of all compiled functions are then those of one model.
"""

import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import stacks, tree
from dsee_jax.deltas.adapter import Adapter, kernels
from dsee_jax.errors import InputError
from dsee_jax.prune import units
from dsee_jax.prune.budget import Costs
from dsee_jax.prune.latency import Latency
from dsee_jax.prune.layers import layer
from dsee_jax.runtime import multihost
from dsee_jax.typing import Cuts, Delta, Params, Units


class Dimensions(NamedTuple):
    """The hidden dimensions that a model keeps."""

    axes: Mapping[str, tuple[int, ...]]
    """``dsee_jax.models.hidden_axes(model)``."""
    kept: np.ndarray
    """bool (width,), True = kept."""

    def size(self, path: str, leaf: Any) -> int:
        """Return the entries of an array that are left."""
        shape = [int(self.kept.sum()) if axis in self.axes.get(path, ()) else n for axis, n in enumerate(leaf.shape)]
        return int(np.prod(shape))

    def along(self, path: str, leaf: Any) -> tuple[np.ndarray, ...]:
        """Return for each axis of an array the entries that are left, bool."""
        own = self.axes.get(path, ())
        return tuple(self.kept if axis in own else np.ones(n, bool) for axis, n in enumerate(leaf.shape))


_ALL = Dimensions({}, np.ones(0, bool))


def flops(
    params: Params,
    adapter: Adapter | None,
    cuts: Cuts,
    paths: Iterable[str],
    *,
    length: int,
    filled: Iterable[str] = (),
    hidden: Dimensions = _ALL,
) -> Costs:
    """Return the multiply-adds of the matrices at ``paths`` and of the updates, zeros of the matrices skipped.

    There are two costs: per token without attention scores, and per token of an example of ``length`` tokens, with the
    attention scores and weighted sums of values. Both grow evenly with the length: a model that keeps both within a budget
    keeps it at every length up to ``length``. They are fractions of the matrices with all zeros and without updates. In a run
    these are ``flops_ratio`` and the ratio of ``flops_per_example`` in ``metrics.json``.

    Args:
      params: the params of the unpruned model.
      adapter: its updates; None: there are none, or they will be folded in.
      cuts: ``dsee_jax.models.cuts(model)``.
      paths: the matrices that multiply every token (in a run: `dsee_jax.metrics.flops.kernels`); one or more.
      length: tokens, 1 or more.
      filled: matrices whose zeros count, since training fills them.
      hidden: the hidden dimensions of the model, of which all others are gone; default all.

    Raises:
      InputError: there are no paths, or one is not in ``params``.
    """
    flat, chosen = _checked(params, paths)
    dense = sum(int(np.prod(flat[path].shape)) for path in chosen)
    counted = _counted(flat, adapter, chosen, chosen & set(filled), hidden)
    plain = counted.tables(params, cuts)
    # The rows of a head in the kernel of the attention output are the width of its values.
    attended = {
        layer(number): 2
        * length
        * sum(entries for path, (axis, entries) in each.axes.items() if axis == 0 and path.endswith("/kernel"))
        for number, each in enumerate(cuts.get("heads", ()))
    }
    scores = {name: np.arange(len(table)) * attended[name] for name, table in plain.get("heads", {}).items()}
    longer = {
        kind: {name: table + (scores[name] if kind == "heads" else 0) for name, table in layers.items()}
        for kind, layers in plain.items()
    }
    total = counted.total()
    everything = sum(int(each[-1]) for each in scores.values())
    return _joined([(plain, total, dense), (longer, total + everything, dense + everything)])


def parameters(
    params: Params, adapter: Adapter | None, cuts: Cuts, paths: Iterable[str], *, hidden: Dimensions = _ALL
) -> Costs:
    """Return the parameters at ``paths`` and those of the updates, as a fraction of the parameters at ``paths``; one cost.

    Arguments and errors as of `flops`. In a run ``paths`` is the backbone: all params but those of the trained head.
    """
    flat, chosen = _checked(params, paths)
    counted = _counted(flat, adapter, chosen, chosen, hidden)
    return _joined(
        [(counted.tables(params, cuts), counted.total(), sum(int(np.prod(flat[path].shape)) for path in chosen))]
    )


def latency(measured: Latency, params: Params, cuts: Cuts, *, width: int = 0) -> Costs:
    """Return the time of a forward pass by the measured differences between widths, as a fraction of the whole time; one cost.

    The times of heads and neurons are taken to add up; `dsee_jax.prune.latency.measure` of the chosen widths tells how well
    they do. ``width``: the hidden dimensions of the model (`Latency.of_width`); 0: all.
    """
    own = measured.of_width(width) if width else measured
    tables = {
        kind: {
            layer(number): own.layer_seconds(kind, number, size)
            for number, each in enumerate(layers)
            if (size := units.count(params, each))
        }
        for kind, layers in cuts.items()
    }
    rest = np.array([0.0, own.rest_of_layer()])
    tables["layers"] = {layer(number): rest for number in range(max(map(len, cuts.values())))}
    return _joined([(tables, own.seconds, measured.seconds)])


def _checked(params: Params, paths: Iterable[str]) -> tuple[dict[str, Any], set[str]]:
    """Return the params by path, and ``paths`` if there are any and ``params`` holds them all."""
    flat, chosen = tree.flatten(params), set(paths)
    if not chosen:
        raise InputError("there are no paths of arrays to count; expected one or more")
    for path in sorted(chosen):
        tree.lookup(flat, path)
    return flat, chosen


def _joined(costs: list[tuple[Mapping[str, Mapping[str, np.ndarray]], float, float]]) -> Costs:
    """Return several costs as one `Costs`; each is (tables, whole cost of the model as it is, cost that counts as 1)."""
    fixed = [
        (total - sum(table[-1] for layers in tables.values() for table in layers.values())) / one
        for tables, total, one in costs
    ]
    first, *_ = costs
    kept = {
        kind: {name: np.stack([tables[kind][name] / one for tables, _, one in costs], axis=1) for name in layers}
        for kind, layers in first[0].items()
    }
    return Costs(np.array(fixed), kept)


class _Counted(NamedTuple):
    """The entries of a model that count."""

    flat: Mapping[str, Any]  # the params
    updates: Mapping[str, Delta]
    supports: Mapping[str, Any]
    paths: Container[str]  # of the params that count
    filled: Container[str]  # of those whose zeros count
    hidden: Dimensions

    def total(self) -> int:
        """Return the number of all entries that count, those of updates among them."""
        params = sum(self.of_param(path) for path in self.flat if path in self.paths)
        return params + sum(map(self.of_update, self.updates))

    def tables(self, params: Params, cuts: Cuts) -> dict[str, dict[str, np.ndarray]]:
        """Return ``{kind: {layer: (units + 1,)}}``: the entries by kept units.

        Where units differ, by zeros or by coordinates of supports, row k counts the k most expensive units. Of the kind
        ``layers`` it is all that belongs to no unit, and the factors of updates that no cut of units shortens.
        """
        cut = {path: axis for layers in cuts.values() for each in layers for path, (axis, _) in each.axes.items()}
        rest = np.zeros((2, max(map(len, cuts.values()))), np.int64)
        for path in self.flat:
            number = stacks.place(path)[1]
            if number is None:
                continue
            if path not in cut:
                rest[1, number] += self.of_param(path) if path in self.paths else 0
                rest[1, number] += self.of_update(path)
            else:
                rest[1, number] += self.of_factor(path, 1 - cut[path])
        of_layers = {"layers": {layer(number): each for number, each in enumerate(rest.T)}}
        return of_layers | {
            kind: {
                layer(number): self.of_units(each, size)
                for number, each in enumerate(layers)
                if (size := units.count(params, each))
            }
            for kind, layers in cuts.items()
        }

    def of_units(self, each: Units, size: int) -> np.ndarray:
        """Return the entries of the 0 to ``size`` most expensive units of a layer, (size + 1,)."""
        own = np.zeros(size, np.int64)
        for path, (axis, entries) in each.axes.items():
            if path in self.paths:
                own += self.along(path, axis).reshape(-1, entries).sum(1)
            own += self.of_factor(path, axis) // size
            own += np.bincount(self.coordinates(path)[:, axis] // entries, minlength=size)
        return np.concatenate([[0], np.cumsum(np.sort(own)[::-1])])

    def of_param(self, path: str) -> int:
        return self.hidden.size(path, self.flat[path]) if path in self.filled else int(self.along(path, 0).sum())

    def along(self, path: str, axis: int) -> np.ndarray:
        """Return the entries of an array that count, by the index along an axis, int64."""
        leaf = self.flat[path]
        kept = self.hidden.along(path, leaf)
        if path in self.filled:
            return kept[axis] * np.int64(np.prod([one.sum() for other, one in enumerate(kept) if other != axis]))
        return multihost.to_host(_nonzeros(leaf, kept, axis)).astype(np.int64)

    def of_update(self, path: str) -> int:
        return sum(self.of_factor(path, axis) for axis in (0, 1)) + len(self.coordinates(path))

    def of_factor(self, path: str, axis: int) -> int:
        """Return the entries of the factor along an axis of a kernel: a has its rows, and b its columns."""
        factor: Any = self.updates.get(path, {}).get("ab"[axis])
        if factor is None:
            return 0
        own = axis in self.hidden.axes.get(path, ())
        return factor.size // len(self.hidden.kept) * int(self.hidden.kept.sum()) if own else factor.size

    def coordinates(self, path: str) -> np.ndarray:
        """Return the coordinates (nonzeros, 2) of the sparse values of a kernel that are left."""
        if path not in self.supports:
            return np.zeros((0, 2), np.int64)
        places, kept = multihost.to_host(self.supports[path]), self.hidden.along(path, self.flat[path])
        return places[np.all([one[places[:, axis]] for axis, one in enumerate(kept)], axis=0)]


def _counted(
    flat: Mapping[str, Any],
    adapter: Adapter | None,
    paths: Container[str],
    filled: Container[str],
    hidden: Dimensions,
) -> _Counted:
    deltas, supports = ({}, {}) if adapter is None else (adapter.deltas, adapter.supports)
    return _Counted(flat, kernels(deltas), tree.flatten(supports), paths, filled, hidden)


@functools.partial(jax.jit, static_argnums=2)
def _nonzeros(w: jax.Array, kept: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """Return the nonzero entries by the index along an axis, int32; a whole matrix may have more than an int32 can count.

    ``kept`` flags the entries along each axis that count.
    """
    for place, flags in enumerate(kept):
        w = jnp.where(flags.reshape([-1 if place == other else 1 for other in range(w.ndim)]), w, 0)
    return jnp.count_nonzero(w, axis=tuple(other for other in range(w.ndim) if other != axis))
