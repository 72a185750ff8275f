"""Units under a budget: how many heads and neurons each layer keeps, so that the kept score is the highest that fits.

A slot is one part of a model, such as the heads of a layer, and its choices are numbers of units to keep. With ``x`` = 1 for
the choice that a slot takes, `allocate` solves the integer programme ::

    maximise    sum over slots and choices of  value * x
    subject to  sum over slots and choices of  cost * x  <=  budget      for each resource
                sum over the choices of a slot of  x  =  1
                x of a choice  <=  x of a choice that it needs

which is a knapsack with several choices, as in Shen et al. (arXiv 2210.06659). The value of keeping ``k`` units is the sum of
their ``k`` highest scores: the scores of all slots must add up, and those of heads must compare with those of neurons. The
gradient scores of `dsee_jax.prune.sensitivity` do; magnitudes are first brought to one scale by `balanced`.

Where layers have scores, whole layers may go too: a slot of each layer has the choices to drop it, which needs the choices of
0 heads and 0 neurons, and to keep it. A dropped layer loses its own score instead of the sum of the scores of its units.

The hidden width is one choice for the whole model and multiplies the costs of all heads and neurons, so it is no variable of a
linear programme. `choose_width` solves the programme at each of a few widths, with the costs at that width, and takes the one
of the highest total. A width keeps its highest-scoring dimensions (`dimensions`) and adds the sum of their scores.

Costs are fractions of the unpruned model (`dsee_jax.prune.costs`). Nothing here depends on time or on random numbers: HiGHS
runs on one thread, and its search ends after `NODES` nodes, by a count and not by a clock.

Units of a few sizes rarely fill a budget to the last entry. The relaxation does, and closing that last difference by search
takes more nodes than any run has time for, while the best allocation is mostly found before the first node is split.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import scipy  # which imports its submodules at their first use

from dsee_jax.errors import InputError, shorten
from dsee_jax.prune.layers import layer
from dsee_jax.runtime import multihost
from dsee_jax.typing import Array, Masks, Tree

GAP = 1e-3
"""The search ends once no allocation can have a value higher by more than this fraction."""

NODES = 50
"""The most nodes of the search, once it has an allocation. Scores that fall from unit to unit within a layer need few: the
relaxation is nearly whole."""

ROUNDING = 1e-12
"""A sum of costs may exceed the budget by this fraction: the rounding of the sum, less than one entry of any model."""

STEPS = 32
"""The parts into which the neurons of a layer are divided where no multiple is given."""

WIDTHS = 16
"""The parts into which the hidden width is divided where no multiple is given."""

_LIMIT, _INFEASIBLE = 1, 2
"""The status of `scipy.optimize.milp`."""

Counts: TypeAlias = Mapping[str, Mapping[str, Sequence[int]]]
"""``{kind: {layer: numbers of units}}``: the choices."""


class Costs(NamedTuple):
    """The cost of a model by the number of units that each layer keeps, as fractions of the cost of the unpruned model.

    A model may have several costs (resources), each of which the budget bounds. The costs of several models, such as of
    several hidden widths, are one `Costs` whose arrays have one more axis before all others; `models` takes it apart.
    """

    fixed: np.ndarray
    """(resources,): all that belongs to no unit and no layer, such as embeddings."""
    kept: Mapping[str, Mapping[str, np.ndarray]]
    """``{kind: {layer: (units + 1, resources)}}``: row k is the cost of keeping k units. Of the kind ``layers`` a layer has
    two rows: without it, and with it besides its units."""

    def models(self) -> list["Costs"]:
        """Return the costs of each of several models."""
        return [jax.tree.map(operator.itemgetter(number), self) for number in range(len(self.fixed))]

    def ratio(self, kept: Masks) -> np.ndarray:
        """Return the costs (resources,) of a model with these kept units (`dsee_jax.prune.units`).

        Raises:
          InputError: ``kept`` has units without costs, such as ``hidden``.
        """
        for kind in kept.keys() - self.kept.keys():
            raise InputError(f"{kind}: these units have no costs; expected {', '.join(self.kept)}")
        dropped = _dropped(kept.get("layers", ()))

        def count(kind: str, name: str, table: np.ndarray) -> int:
            if name in dropped:
                return 0
            units = {} if kind == "layers" else kept.get(kind, {})
            return int(np.sum(units[name])) if name in units else len(table) - 1

        rows = [table[count(kind, name, table)] for kind, tables in self.kept.items() for name, table in tables.items()]
        return self.fixed + np.sum(rows, axis=0)


class Slot(NamedTuple):
    """The choices of one part of a model, of which exactly one is taken."""

    values: np.ndarray
    """(choices,)"""
    costs: np.ndarray
    """(choices, resources)"""


Need: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""((slot, choice), (slot, choice)): the first choice may be taken only with the second."""


def counts(scores: Tree, *, multiple: int = 0) -> dict[str, dict[str, list[int]]]:
    """Return the numbers of units that `choose` may keep: every number of heads, and few numbers of neurons.

    Args:
      scores: as of `choose`; only their shapes count.
      multiple: the numbers of neurons are multiples of it, and the full number. 0: of a 32nd of the layer, rounded down.
    """

    def choices(kind: str, size: int) -> list[int]:
        step = 1 if kind == "heads" else multiple or max(size // STEPS, 1)
        return [*range(0, size, step), size]

    return {
        kind: {name: choices(kind, np.size(each)) for name, each in layers.items()}
        for kind, layers in _of_units(scores).items()
    }


def widths(size: int, *, multiple: int = 0) -> list[int]:
    """Return the widths that a target chooses among, in increasing order; the last is ``size``, all dimensions.

    Args:
      size: the hidden width of the model.
      multiple: the others are multiples of it. 0: of a 16th of ``size``, rounded down.
    """
    step = multiple or max(size // WIDTHS, 1)
    return [*range(step, size, step), size]


def dimensions(scores: Array, widths: Sequence[int]) -> np.ndarray:
    """Return the hidden dimensions that each width keeps, those of the highest scores: bool (widths, dimensions).

    Args:
      scores: (dimensions,); of equal ones the lowest index stays, and one that is not a number counts as 0.
      widths: each 0 to the number of dimensions.
    """
    places = np.argsort(np.argsort(-np.nan_to_num(_host(scores)), kind="stable"))
    return places < np.reshape(widths, (-1, 1))


def balanced(scores: Tree, costs: Costs) -> dict[str, dict[str, np.ndarray]]:
    """Return scores of heads and neurons scaled so that both kinds have the same total score per total cost.

    The sums of magnitudes over a head and over a neuron have no common scale. After this, a kind whose units all score alike
    is as good a place to save as any other, and the units that go are those that score low among their own kind.
    """
    scaled: dict[str, dict[str, np.ndarray]] = {}
    for kind, layers in _of_units(scores).items():
        cost = sum(float(np.sum(table[-1] - table[0])) for table in costs.kept[kind].values())
        total = sum(float(np.nansum(_host(each))) for each in layers.values())
        scaled[kind] = {name: _host(each) * (cost / total if total else 1.0) for name, each in layers.items()}
    return scaled


def balanced_hidden(scores: Array, whole: Costs, narrow: Costs, width: int) -> np.ndarray:
    """Return scores of hidden dimensions with the total score per total cost of `balanced`.

    Args:
      scores: (dimensions,)
      whole: the costs of all dimensions.
      narrow: the costs of ``width`` of them, fewer than all.
      width: 1 or more.
    """
    host = _host(scores)
    saved = float((whole.ratio({}) - narrow.ratio({}))[0]) * len(host) / (len(host) - width)
    total = float(np.nansum(host))
    return host * (saved / total if total else 1.0)


def with_layers(scores: Tree, costs: Costs) -> dict[str, Any]:
    """Return scores of heads and neurons with a score for each layer, (layers,): the sum of those of its units."""
    units = _of_units(scores)
    totals = [
        sum(float(np.nansum(_host(layers[name]))) for layers in units.values() if name in layers)
        for name in costs.kept["layers"]
    ]
    return {**units, "layers": np.array(totals)}


def choose(
    scores: Tree, costs: Costs, budget: float, *, among: Counts | None = None, uniform: bool = False
) -> dict[str, Any]:
    """Return the units to keep: the highest score within a budget.

    Within a layer the units of the highest scores stay. A score that is not a number counts as the lowest. Of units with equal
    scores those of the lowest index stay.

    Args:
      scores: ``{kind: {layer: (units,)}}``, 0 or more; with ``layers`` (layers,), the score that is lost with a whole layer,
        layers may be dropped, all but one.
      costs: of the same layers, as from `dsee_jax.prune.costs`.
      budget: the most of each cost, as a fraction of the unpruned model, a finite number.
      among: the numbers of units to choose from, in increasing order; default `counts`. 0 is one of them where layers may be
        dropped and ``uniform`` is not set.
      uniform: keep the same number of units in every layer that stays; all layers must have equal choices. Layers are then
        dropped in the order of their scores.

    Returns:
      The kept units, True = kept, for `dsee_jax.compact`. Their cost is at most the budget, up to `ROUNDING`.

    Raises:
      InputError: no choice fits the budget, and the message names the lowest cost of all; scores and costs have different
        units; a score is infinite or negative; ``among`` lacks a layer or has numbers out of range; the layers differ and
        ``uniform`` is set; or the solver fails.
    """
    solution = _solve(scores, costs, budget, among=among, uniform=uniform)
    if solution is None:
        raise too_small(budget, least(scores, costs, among=among, uniform=uniform), [*scores])
    return solution.kept


def least(scores: Tree, costs: Costs, *, among: Counts | None = None, uniform: bool = False) -> float:
    """Return the lowest cost that the numbers of units allow, as a fraction of the unpruned model; arguments as of `choose`.

    Of several costs it is the highest. No programme is solved: the fewest units of all parts cost the least of each. Where
    layers may go and ``uniform`` is set, the layer of the highest score stays.
    """
    each: dict[str, Any] = {name: table[1] for name, table in costs.kept.get("layers", {}).items()}
    for kind, layers in (counts(scores) if among is None else among).items():
        for name, numbers in layers.items():
            each[name] = each.get(name, 0.0) + costs.kept[kind][name][numbers].min(0)
    if "layers" not in scores:
        return float((costs.fixed + sum(each.values())).max())
    stay = [layer(int(np.argmax(np.nan_to_num(_host(scores["layers"])))))] if uniform else [*each]
    return min(float((costs.fixed + each[name]).max()) for name in stay)


def fits(cost: float, budget: float) -> bool:
    """Return whether a cost is at most the budget, up to `ROUNDING`."""
    return cost <= budget * (1 + ROUNDING)


class _Solution(NamedTuple):
    """The result of `_solve`."""

    value: float
    """The sum of the scores that are kept."""
    kept: dict[str, Any]
    """The units to keep, as of `choose`."""


def _solve(
    scores: Tree, costs: Costs, budget: float, *, among: Counts | None = None, uniform: bool = False
) -> _Solution | None:
    """Return the units of the highest score within a budget, and that score; None if nothing fits.

    Arguments and other errors as of `choose`.
    """
    if not np.isfinite(budget):
        raise InputError(f"the budget is {budget}; expected a fraction of the unpruned model")
    scores = _of_layers_checked(scores, costs)
    for kind, tables in costs.kept.items():
        lacking = [] if kind == "layers" else [name for name in tables if name not in scores.get(kind, {})]
        if lacking:
            raise InputError(f"{kind} of {lacking[0]}: costs of {len(tables[lacking[0]]) - 1} units, and no scores")
    # A budget that equals the sum of all costs is enough for them, in whatever order they are added.
    limit = budget * (1 + ROUNDING)
    among = counts(scores) if among is None else among
    parts = {
        (kind, name): _part(kind, name, scores, costs, among)
        for kind, layers in _of_units(scores).items()
        for name in layers
    }
    if uniform:
        depth = np.size(scores["layers"]) if "layers" in scores else 1
        attempts = [_uniform(parts, scores, costs, limit, dropped) for dropped in range(depth)]
    else:
        attempts = [_apart(parts, scores, costs, limit)]
    best = max(filter(None, attempts), key=lambda attempt: attempt.value, default=None)
    if best is None:
        return None
    flags, kept = best.layers, dict[str, Any]()
    for (kind, name), count in best.kept.items():
        units = np.zeros(len(parts[kind, name].order), bool)
        units[parts[kind, name].order[:count]] = True
        kept.setdefault(kind, {})[name] = units
    return _Solution(best.value, kept if flags.all() else kept | {"layers": flags})


def too_small(budget: float, least: float, kinds: Iterable[str]) -> InputError:
    """Return the error of a budget that is below ``least``, the lowest cost of units of these kinds."""
    *others, last = ("hidden dimensions" if kind == "hidden" else kind for kind in kinds)
    words = " and ".join(filter(None, [", ".join(others), last]))
    return InputError(
        f"the budget is {budget:g} of the unpruned model, and with the fewest {words} {least:.4g} of it is left: use more "
        "than that"
    )


def choose_width(
    scores: Tree,
    costs: Mapping[int, Costs],
    budget: float,
    *,
    among: Mapping[int, Counts],
    uniform: bool = False,
) -> dict[str, Any]:
    """Return the units to keep, hidden dimensions among them: the highest score within a budget.

    The result scores at least as high as that of `choose` at the full width, if that is among the widths. Of widths with equal
    totals the largest is taken.

    Args:
      scores: as of `choose`, and ``hidden`` (width,), the scores of the hidden dimensions.
      costs: by width, the costs of the model with the `dimensions` of that width alone, as fractions of the unpruned model.
      budget: as of `choose`.
      among: the numbers of units to choose from by width; its keys are the widths.
      uniform: as of `choose`.

    Returns:
      The kept units; ``hidden`` is absent where all dimensions stay.

    Raises:
      InputError: as `choose`; the least cost is that over all widths. Or a width is out of range, or has no costs.
    """
    units: dict[str, Any] = {**jax.tree.map(_host, scores)}
    score = _finite("hidden", units.pop("hidden"))
    size = len(score)
    if not among or min(among) < 1 or max(among) > size:
        raise InputError(f"the widths are {shorten(str([*among]))}; expected some of 1 to {size}")
    for width in among.keys() - costs.keys():
        raise InputError(f"the width {width} has no costs; expected costs of all of {shorten(str([*among]))}")
    # No kept units score more than all of them.
    most = sum(float(np.nansum(each)) for layers in _of_units(units).values() for each in layers.values())
    best = None
    for width in sorted(among, reverse=True):
        (flags,) = dimensions(scores["hidden"], [width])
        gained = float(score[flags].sum())
        if best is not None and gained + most <= best[0]:
            break  # nor can a smaller width be better
        solution = _solve(units, costs[width], budget, among=among[width], uniform=uniform)
        if solution is not None and (best is None or solution.value + gained > best[0]):
            best = solution.value + gained, solution.kept if width == size else solution.kept | {"hidden": flags}
    if best is None:
        lowest = min(least(units, costs[width], among=each, uniform=uniform) for width, each in among.items())
        raise too_small(budget, lowest, [*scores])
    return best[1]


def _of_units(scores: Tree) -> dict[str, Mapping[str, Any]]:
    """Return the scores of heads and neurons, without those of the kinds of the whole model."""
    return {kind: layers for kind, layers in scores.items() if isinstance(layers, Mapping)}


def _dropped(flags: Any) -> set[str]:
    """Return the names of the layers that go."""
    return {layer(number) for number, stays in enumerate(np.asarray(flags).tolist()) if not stays}


def _host(score: object) -> np.ndarray:
    return np.asarray(multihost.to_host(score), np.float64)


def _of_layers_checked(scores: Tree, costs: Costs) -> Tree:
    """Return ``scores``, those of layers on the host and 0 where they are not numbers."""
    if "layers" not in scores:
        return scores
    score, tables = _host(scores["layers"]), costs.kept.get("layers", {})
    if score.ndim != 1 or {layer(number) for number in range(len(score))} != tables.keys():
        raise InputError(
            f"layers: scores of the shape {score.shape}, and costs of {len(tables)} layers; they are of different models"
        )
    return {**scores, "layers": _finite("layers", score)}


def _finite(name: str, score: np.ndarray) -> np.ndarray:
    """Return scores with 0 in place of those that are not numbers."""
    bad = score[~np.isnan(score) & ~((score >= 0) & (score < np.inf))]
    if bad.size:
        raise InputError(f"{name}: a score is {bad[0]}; expected finite numbers of 0 or more")
    return np.nan_to_num(score)


class _Part(NamedTuple):
    """The units of one kind in one layer."""

    slot: Slot
    choices: np.ndarray  # numbers of units
    order: np.ndarray  # units, the highest score first
    total: float  # of all scores


def _part(kind: str, name: str, scores: Tree, costs: Costs, among: Counts) -> _Part:
    score, table = _host(scores[kind][name]), costs.kept.get(kind, {}).get(name)
    if table is None or len(table) != len(score) + 1:
        units = "none" if table is None else len(table) - 1
        raise InputError(
            f"{kind} of {name}: {len(score)} scores, and costs of {units} units; they are of different models"
        )
    value, choices = _finite(f"{kind} of {name}", score), np.asarray(among.get(kind, {}).get(name, ()), int)
    if not choices.size or choices.min() < 0 or choices.max() > len(score):
        raise InputError(
            f"among: the numbers of {kind} of {name} are {choices.tolist()}; expected some of 0 to {len(score)}"
        )
    order = np.argsort(-score, kind="stable")
    gained = np.concatenate([[0.0], np.cumsum(value[order])])
    return _Part(Slot(gained[choices], table[choices]), choices, order, float(gained[-1]))


class _Attempt(NamedTuple):
    """The solution of one programme."""

    value: float
    layers: np.ndarray  # (layers,), True = kept
    kept: dict[tuple[str, str], int]  # units of the layers that stay


_Parts: TypeAlias = Mapping[tuple[str, str], _Part]


def _apart(parts: _Parts, scores: Tree, costs: Costs, budget: float) -> _Attempt | None:
    """Choose for every layer by itself; None: nothing fits."""
    names, slots, needs = [*parts], [part.slot for part in parts.values()], list[Need]()
    lost = _host(scores["layers"]) if "layers" in scores else np.zeros(0)
    fixed = costs.fixed + _of_layers(costs, [] if lost.size else [*costs.kept.get("layers", {})])
    limit = budget - fixed
    if lost.size:
        for (kind, name), part in parts.items():
            if part.choices[0]:
                first = f"{kind} of {name} begin with {part.choices[0]}"
                raise InputError(f"among: the numbers of {first}; expected 0 first, because layers may be dropped")
        # One more resource: the number of dropped layers, of which one stays.
        limit = np.append(limit, len(lost) - 1)
        slots = [Slot(slot.values, np.pad(slot.costs, ((0, 0), (0, 1)))) for slot in slots]
        tables = [costs.kept["layers"][layer(number)] for number in range(len(lost))]
        for number, table in enumerate(tables):
            own = [place for place, (_, name) in enumerate(names) if name == layer(number)]
            needs += [((len(slots), 0), (place, 0)) for place in own]
            gain = sum(parts[names[place]].total for place in own) - lost[number]
            slots.append(Slot(np.array([gain, 0.0]), np.column_stack([table, [1.0, 0.0]])))
    chosen = allocate(slots, limit, needs)
    if chosen is None:
        return None
    value = sum(float(slot.values[choice]) for slot, choice in zip(slots, chosen, strict=True))
    flags = np.array(chosen[len(names) :], bool)
    dropped = _dropped(flags)
    kept = {
        each: int(parts[each].choices[choice])
        for each, choice in zip(names, chosen, strict=False)
        if each[1] not in dropped
    }
    return _Attempt(value, flags, kept)


def _uniform(parts: _Parts, scores: Tree, costs: Costs, budget: float, dropped: int) -> _Attempt | None:
    """Choose one number of units of each kind for all layers but the ``dropped`` ones of the lowest scores."""
    lost = _host(scores["layers"]) if "layers" in scores else np.zeros(0)
    flags = np.ones(len(lost), bool)
    flags[np.argsort(-lost, kind="stable")[len(lost) - dropped :]] = False
    gone = _dropped(flags)
    gain = sum(part.total for (_, name), part in parts.items() if name in gone) - float(lost[~flags].sum())
    stay = [each for each in parts if each[1] not in gone]
    groups = [[each for each in stay if each[0] == kind] for kind in dict.fromkeys(kind for kind, _ in stay)]
    for group in groups:
        if len({tuple(parts[each].choices) for each in group}) > 1:
            raise InputError(
                f"the layers have different numbers of {group[0][0]}: they cannot all keep the same number"
            )
    slots = [
        Slot(*(np.sum(column, axis=0) for column in zip(*(parts[each].slot for each in group), strict=True)))
        for group in groups
    ]
    fixed = costs.fixed + _of_layers(costs, [name for name in costs.kept.get("layers", {}) if name not in gone])
    chosen = allocate(slots, budget - fixed)
    if chosen is None:
        return None
    value = gain + sum(float(slot.values[choice]) for slot, choice in zip(slots, chosen, strict=True))
    kept = {
        each: int(parts[each].choices[choice]) for group, choice in zip(groups, chosen, strict=True) for each in group
    }
    return _Attempt(value, flags, kept)


def _of_layers(costs: Costs, names: Sequence[str]) -> np.ndarray:
    """Return the costs of these layers besides their units."""
    return np.sum([costs.kept["layers"][name][1] for name in names], axis=0) if names else np.zeros_like(costs.fixed)


def allocate(slots: Sequence[Slot], budget: np.ndarray, needs: Sequence[Need] = ()) -> list[int] | None:
    """Return the choice of every slot: the highest sum of values whose costs are at most ``budget`` (resources,).

    The costs are within the budget exactly, and the sum of values is within `GAP` of the highest unless the search ends at
    `NODES`. The result is None if no choice fits.

    Raises:
      InputError: the solver has failed; the message has its own.
    """
    if not slots:
        return [] if (budget >= 0).all() else None
    values = np.concatenate([slot.values for slot in slots])
    costs = np.concatenate([slot.costs for slot in slots])
    sizes = [len(slot.values) for slot in slots]
    starts = np.cumsum([0, *sizes[:-1]])
    one_each = scipy.sparse.csr_array(
        (np.ones(len(values)), (np.repeat(np.arange(len(slots)), sizes), np.arange(len(values))))
    )
    needed = scipy.sparse.lil_array((max(len(needs), 1), len(values)))
    for row, ((slot, choice), (other, condition)) in enumerate(needs):
        needed[row, starts[slot] + choice], needed[row, starts[other] + condition] = 1, -1
    # HiGHS takes absolute tolerances of 1e-6: the largest numbers are 1e4.
    value_scale = 1e4 / max(float(np.abs(values).max()), 1e-300)
    cost_scale = 1e4 / np.maximum(np.abs(costs).max(0), 1e-300)
    limit, step, nodes = np.asarray(budget, np.float64), 1.0, NODES
    while True:
        result = scipy.optimize.milp(
            -values * value_scale,
            integrality=np.ones(len(values)),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(one_each, 1, 1),
                scipy.optimize.LinearConstraint(needed.tocsr(), -np.inf, 0),
                scipy.optimize.LinearConstraint((costs * cost_scale).T, -np.inf, limit * cost_scale),
            ],
            # With presolve, HiGHS 1.12 prints lines of its search, whatever its options.
            options={"mip_rel_gap": GAP, "node_limit": nodes, "presolve": False},
        )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None:
            if result.status != _LIMIT:
                raise InputError(f"the choice of units failed: {result.message}; use a budget that differs a little")
            nodes *= 10  # the search has ended before it had any allocation
            continue
        chosen = [int(np.argmax(part)) for part in np.split(result.x, starts[1:].tolist())]
        spent = costs[np.add(starts, chosen)].sum(0)
        if (spent <= budget).all():
            return chosen
        # A sum above the budget by less than the tolerance: the next search has a lower limit.
        limit, step = budget - step * np.maximum(spent - budget, 1e-12), 10 * step
