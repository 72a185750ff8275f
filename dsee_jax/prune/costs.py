"""The cost of a model by the numbers of units that its layers keep, counted from its arrays or read off measured times.

Each function returns the `Costs` that `dsee_jax.prune.budget.choose` reads. The updates of an adapter count as factors that
stay apart: the factor that the cut shortens costs by unit, the other as long as its layer stays. A layer without units has no
such factor either: the costs are then a little too high. Were it saved with the last unit, layers would be emptied for it.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax import stacks, tree
from dsee_jax.deltas.adapter import Adapter, count, kernels
from dsee_jax.errors import InputError
from dsee_jax.prune import units
from dsee_jax.prune.budget import Costs
from dsee_jax.prune.latency import Latency
from dsee_jax.prune.layers import layer
from dsee_jax.runtime import multihost
from dsee_jax.typing import Cuts, Params, Units


def flops(
    params: Params,
    adapter: Adapter | None,
    cuts: Cuts,
    paths: Iterable[str],
    *,
    length: int,
    filled: Iterable[str] = (),
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

    Raises:
      InputError: there are no paths, or one is not in ``params``.
    """
    flat, chosen = _checked(params, paths)
    dense = sum(int(np.prod(flat[path].shape)) for path in chosen)
    counted = chosen & set(filled)
    plain = _tables(params, adapter, cuts, chosen, counted)
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
    entries = sum(int(np.prod(flat[path].shape)) if path in counted else _nonzeros(flat[path]) for path in chosen)
    total = entries + count(None if adapter is None else adapter.deltas)
    everything = sum(int(each[-1]) for each in scores.values())
    return _joined([(plain, total, dense), (longer, total + everything, dense + everything)])


def parameters(params: Params, adapter: Adapter | None, cuts: Cuts, paths: Iterable[str]) -> Costs:
    """Return the parameters at ``paths`` and those of the updates, as a fraction of the parameters at ``paths``; one cost.

    Arguments and errors as of `flops`. In a run ``paths`` is the backbone: all params but those of the trained head.
    """
    flat, chosen = _checked(params, paths)
    total = sum(int(np.prod(flat[path].shape)) for path in chosen)
    updates = count(None if adapter is None else adapter.deltas)
    return _joined([(_tables(params, adapter, cuts, chosen, chosen), total + updates, total)])


def latency(measured: Latency, params: Params, cuts: Cuts) -> Costs:
    """Return the time of a forward pass by the measured differences between widths, as a fraction of the whole time; one cost.

    The times of heads and neurons are taken to add up; `dsee_jax.prune.latency.measure` of the chosen widths tells how well
    they do.
    """
    tables = {
        kind: {
            layer(number): measured.layer_seconds(kind, number, size)
            for number, each in enumerate(layers)
            if (size := units.count(params, each))
        }
        for kind, layers in cuts.items()
    }
    rest = np.array([0.0, measured.rest_of_layer()])
    tables["layers"] = {layer(number): rest for number in range(max(map(len, cuts.values())))}
    return _joined([(tables, measured.seconds, measured.seconds)])


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


def _tables(
    params: Params, adapter: Adapter | None, cuts: Cuts, paths: Container[str], filled: Container[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Return ``{kind: {layer: (units + 1,)}}``: the entries of the arrays at ``paths``, and of updates, by kept units.

    Where units differ, by zeros or by coordinates of supports, row k counts the k most expensive units. Zeros count at the
    paths ``filled``. Of the kind ``layers`` it is all that belongs to no unit, and the factors of updates that no cut of
    units shortens.
    """
    flat, updates = tree.flatten(params), kernels(None if adapter is None else adapter.deltas)
    cut = {path: axis for layers in cuts.values() for each in layers for path, (axis, _) in each.axes.items()}
    rest = np.zeros((2, max(map(len, cuts.values()))), np.int64)
    for path in flat:
        number = stacks.place(path)[1]
        if number is None:
            continue
        delta = updates.get(path, {})
        if path not in cut:
            if path in paths:
                rest[1, number] += int(np.prod(flat[path].shape)) if path in filled else _nonzeros(flat[path])
            rest[1, number] += sum(leaf.size for leaf in delta.values())
        elif "a" in delta:
            # a has the rows of the kernel, and b its columns.
            rest[1, number] += delta["b" if cut[path] == 0 else "a"].size
    of_layers = {"layers": {layer(number): each for number, each in enumerate(rest.T)}}
    return of_layers | {
        kind: {
            layer(number): _table(flat, adapter, each, size, paths, filled)
            for number, each in enumerate(layers)
            if (size := units.count(params, each))
        }
        for kind, layers in cuts.items()
    }


def _table(
    flat: Mapping[str, Any],
    adapter: Adapter | None,
    each: Units,
    size: int,
    paths: Container[str],
    filled: Container[str],
) -> np.ndarray:
    updates, own = kernels(None if adapter is None else adapter.deltas), np.zeros(size, np.int64)
    supports = tree.flatten({} if adapter is None else adapter.supports)
    for path, (axis, entries) in each.axes.items():
        if path in paths:
            whole = int(np.prod(flat[path].shape)) // size
            own += whole if path in filled else _nonzeros_by_unit(flat[path], axis, entries)
        delta = updates.get(path, {})
        if "a" in delta:
            own += delta["a" if axis == 0 else "b"].size // size
        if "values" in delta:
            coordinates = multihost.to_host(supports[path])[:, axis] // entries
            own += np.bincount(coordinates, minlength=size)
    return np.concatenate([[0], np.cumsum(np.sort(own)[::-1])])


@jax.jit
def _rows(w: jax.Array) -> jax.Array:
    """Return the nonzero entries of each row, int32; a whole matrix may have more than an int32 can count."""
    return jnp.count_nonzero(w.reshape(len(w), -1), axis=1)


def _nonzeros(w: Any) -> int:
    return int(multihost.to_host(_rows(w)).astype(np.int64).sum())


def _nonzeros_by_unit(w: Any, axis: int, entries: int) -> np.ndarray:
    along = multihost.to_host(_rows(jnp.moveaxis(jnp.asarray(w), axis, 0)))
    return along.reshape(-1, entries).sum(1, dtype=np.int64)
