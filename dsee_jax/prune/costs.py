"""The cost of a model by the numbers of units that its layers keep, counted from its arrays or read off measured times.

Each function returns the `Costs` that `dsee_jax.prune.budget.choose` reads. The updates of an adapter count as factors that
stay apart: the factor that the cut shortens costs by unit, the other as long as its layer stays. A layer without units has no
such factor either: the costs are then a little too high. Were it saved with the last unit, layers would be emptied for it.

The costs of a model with fewer hidden dimensions are counted on the arrays of the unpruned one. One pass over the arrays
counts the costs of several such models, see `Dimensions`.
"""

import functools
import string
from collections.abc import Container, Iterable, Mapping, Sequence
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
    """The hidden dimensions that a model keeps, or each of several models, whose costs then have the same leading axes."""

    axes: Mapping[str, tuple[int, ...]]
    """``dsee_jax.models.hidden_axes(model)``."""
    kept: np.ndarray
    """bool (..., width), True = kept."""
    most: bool = False
    """Whether the costs are a bound for all choices of as many dimensions: of the nonzero entries as many count as any choice
    has, and all sparse values of updates."""

    def entries(self, path: str, shape: Sequence[int], axis: int) -> np.ndarray:
        """Return the entries of an array that are left, by the index along an axis, int64 (..., n)."""
        flags = self.kept if axis in self.axes.get(path, ()) else np.ones(shape[axis], bool)
        return self._entries_of_index(path, shape, axis) * flags

    def bound(self, path: str, shape: Sequence[int], axis: int, nonzeros: np.ndarray) -> np.ndarray:
        """Return the most nonzero entries that any choice of as many dimensions leaves, int64 (..., n).

        ``nonzeros`` (n,) are those of all dimensions, by the index along ``axis``. Along an axis of hidden dimensions the
        largest numbers come first, and those that are left.
        """
        most = np.minimum(self._entries_of_index(path, shape, axis), nonzeros)
        if axis not in self.axes.get(path, ()):
            return most
        return np.sort(most)[..., ::-1] * (np.arange(shape[axis]) < self._width())

    def _entries_of_index(self, path: str, shape: Sequence[int], axis: int) -> np.ndarray:
        """Return the entries of one index along an axis that are left, int64 (..., 1)."""
        own = self.axes.get(path, ())
        others = [size for other, size in enumerate(shape) if other != axis and other not in own]
        return self._width() ** sum(other != axis for other in own) * np.prod(others, dtype=np.int64)

    def _width(self) -> np.ndarray:
        """Return the number of dimensions, int64 (..., 1)."""
        return np.asarray(self.kept.sum(-1, dtype=np.int64, keepdims=True))


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
      hidden: the hidden dimensions that are left; default all.

    Raises:
      InputError: there are no paths, or one is not in ``params``.
    """
    flat, chosen = _checked(params, paths)
    dense = sum(int(np.prod(flat[path].shape)) for path in chosen)
    counted = _counted(flat, adapter, cuts, chosen, chosen & set(filled), hidden)
    plain = counted.tables(params, cuts)
    # The rows of a head in the kernel of the attention output are the width of its values.
    attended = {
        layer(number): 2
        * length
        * sum(entries for path, (axis, entries) in each.axes.items() if axis == 0 and path.endswith("/kernel"))
        for number, each in enumerate(cuts.get("heads", ()))
    }
    scores = {name: np.arange(table.shape[-1]) * attended[name] for name, table in plain.get("heads", {}).items()}
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
    counted = _counted(flat, adapter, cuts, chosen, chosen, hidden)
    return _joined(
        [(counted.tables(params, cuts), counted.total(), sum(int(np.prod(flat[path].shape)) for path in chosen))]
    )


def latency(measured: Latency, params: Params, cuts: Cuts, *, width: int | np.ndarray = 0) -> Costs:
    """Return the time of a forward pass by the measured differences between widths, as a fraction of the whole time; one cost.

    The times of heads and neurons are taken to add up; `dsee_jax.prune.latency.measure` of the chosen widths tells how well
    they do. ``width``: the number of hidden dimensions (`Latency.of_width`), one or int (models,); 0: all.
    """
    if isinstance(width, np.ndarray):
        each = [latency(measured, params, cuts, width=int(size)) for size in width]
        return jax.tree.map(lambda *parts: np.stack(parts), *each)
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
        (total - sum(table[..., -1] for layers in tables.values() for table in layers.values())) / one
        for tables, total, one in costs
    ]
    first, *_ = costs
    kept = {
        kind: {name: np.stack([tables[kind][name] / one for tables, _, one in costs], axis=-1) for name in layers}
        for kind, layers in first[0].items()
    }
    return Costs(np.stack(fixed, axis=-1), kept)


class _Counted(NamedTuple):
    """The entries of models that count; every count has the leading axes of the hidden dimensions."""

    params: Mapping[str, np.ndarray]
    """``{path: int64 (..., n)}``: of each param that counts, by the index along the axis of its units, else along axis 0."""
    updates: Mapping[str, Delta]
    supports: Mapping[str, Any]
    hidden: Dimensions

    def total(self) -> Any:
        """Return the number of all entries that count, those of updates among them."""
        return sum(map(self.of_param, self.params)) + sum(map(self.of_update, self.updates))

    def tables(self, params: Params, cuts: Cuts) -> dict[str, dict[str, np.ndarray]]:
        """Return ``{kind: {layer: (..., units + 1)}}``: the entries by kept units.

        Where units differ, by zeros or by coordinates of supports, row k counts the k most expensive units. Of the kind
        ``layers`` it is all that belongs to no unit, and the factors of updates that no cut of units shortens.
        """
        axes = _unit_axes(cuts)
        rest = np.zeros((max(map(len, cuts.values())), *self.hidden.kept.shape[:-1], 2), np.int64)
        for path in tree.flatten(params):
            number = stacks.place(path)[1]
            if number is None:
                continue
            if path in axes:
                rest[number, ..., 1] += self.of_factor(path, 1 - axes[path])
            else:
                rest[number, ..., 1] += self.of_param(path) + self.of_update(path)
        return {"layers": {layer(number): each for number, each in enumerate(rest)}} | {
            kind: {
                layer(number): self.of_units(each, size)
                for number, each in enumerate(layers)
                if (size := units.count(params, each))
            }
            for kind, layers in cuts.items()
        }

    def of_units(self, each: Units, size: int) -> np.ndarray:
        """Return the entries of the 0 to ``size`` most expensive units of a layer, (..., size + 1)."""
        own = np.zeros((*self.hidden.kept.shape[:-1], size), np.int64)
        for path, (axis, entries) in each.axes.items():
            if path in self.params:
                own += self.params[path].reshape(*own.shape, entries).sum(-1)
            own += np.expand_dims(self.of_factor(path, axis) // size, -1)
            places, left = self.coordinates(path)
            of_entry: Any = (..., places[:, axis] // entries)
            np.add.at(own, of_entry, left)
        return np.cumsum(np.concatenate([np.zeros_like(own[..., :1]), np.sort(own)[..., ::-1]], axis=-1), axis=-1)

    def of_param(self, path: str) -> Any:
        return self.params[path].sum(-1) if path in self.params else 0

    def of_update(self, path: str) -> Any:
        return self.of_factor(path, 0) + self.of_factor(path, 1) + self.coordinates(path)[1].sum(-1)

    def of_factor(self, path: str, axis: int) -> Any:
        """Return the entries of the factor along an axis of a kernel: a has its rows, and b its columns."""
        factor: Any = self.updates.get(path, {}).get("ab"[axis])
        if factor is None:
            return 0
        own = axis in self.hidden.axes.get(path, ())
        return factor.size // self.hidden.kept.shape[-1] * self.hidden.kept.sum(-1) if own else factor.size

    def coordinates(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates (nonzeros, 2) of the sparse values of a kernel, and which are left, bool (..., nonzeros)."""
        if path not in self.supports:
            return np.zeros((0, 2), np.int64), np.zeros(0, bool)
        places = multihost.to_host(self.supports[path])
        axes = () if self.hidden.most else self.hidden.axes.get(path, ())
        flags = [self.hidden.kept[..., places[:, axis]] for axis in axes]
        left = np.ones((*self.hidden.kept.shape[:-1], len(places)), bool)
        return places, np.logical_and.reduce([left, *flags])


def _unit_axes(cuts: Cuts) -> dict[str, int]:
    """Return the axis of the units of every param that has some, by path."""
    return {path: axis for layers in cuts.values() for each in layers for path, (axis, _) in each.axes.items()}


def _counted(
    flat: Mapping[str, Any],
    adapter: Adapter | None,
    cuts: Cuts,
    paths: Container[str],
    filled: Container[str],
    hidden: Dimensions,
) -> _Counted:
    """Count the entries of the params at ``paths``; of those that are ``filled``, zeros too."""
    deltas, supports = ({}, {}) if adapter is None else (adapter.deltas, adapter.supports)
    axes = _unit_axes(cuts)

    def entries(path: str) -> np.ndarray:
        leaf, axis = flat[path], axes.get(path, 0)
        if path in filled:
            return hidden.entries(path, leaf.shape, axis)
        chosen = () if hidden.most else hidden.axes.get(path, ())
        counts = multihost.to_host(_nonzeros(leaf, hidden.kept, chosen, axis)).astype(np.int64)
        if hidden.most:
            counts = hidden.bound(path, leaf.shape, axis, counts)
        return np.broadcast_to(counts, (*hidden.kept.shape[:-1], leaf.shape[axis]))

    return _Counted(
        {path: entries(path) for path in flat if path in paths}, kernels(deltas), tree.flatten(supports), hidden
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _nonzeros(w: jax.Array, kept: jax.Array, hidden: tuple[int, ...], axis: int) -> jax.Array:
    """Return the nonzero entries by the index along an axis, (..., n), where ``kept`` (..., width) flags those that count.

    ``hidden`` are the axes that ``kept`` is of; without any the result is (n,). float32 is exact: an index has fewer than
    2^24 entries.
    """
    names = string.ascii_lowercase[: w.ndim]
    flags = ["..." + names[each] for each in hidden]
    result = "..." * bool(hidden) + names[axis]
    arrays = [(w != 0).astype(jnp.float32), *[kept.astype(jnp.float32)] * len(hidden)]
    return jnp.einsum(f"{','.join([names, *flags])}->{result}", *arrays, precision="highest")
