"""Units under a budget: the programme finds the best of all combinations, and keeps the highest scores of a layer."""

import itertools

import numpy as np
import pytest

from dsee_jax.errors import InputError
from dsee_jax.prune import budget
from dsee_jax.prune.budget import Costs, Slot


def best(slots, limit):
    """Try every combination."""
    combinations = itertools.product(*(range(len(slot.values)) for slot in slots))
    totals = [
        (sum(slot.values[choice] for slot, choice in zip(slots, each, strict=True)), list(each))
        for each in combinations
        if (sum(slot.costs[choice] for slot, choice in zip(slots, each, strict=True)) <= limit).all()
    ]
    return max(totals)[1] if totals else None


@pytest.mark.parametrize("monotone", [True, False])
def test_allocation_is_the_best_of_all(monotone):
    draw = np.random.default_rng(0)
    feasible = 0
    for limit in np.linspace(0.2, 3, 12):
        slots = [Slot(draw.random(size), draw.random((size, 2))) for size in (2, 5, 3, 4)]
        if monotone:
            slots = [Slot(np.sort(slot.values), np.sort(slot.costs, axis=0)) for slot in slots]
        expected = best(slots, np.array([limit, 1.2 * limit]))
        feasible += expected is not None
        assert budget.allocate(slots, np.array([limit, 1.2 * limit])) == expected
    assert feasible > 6


def test_a_cost_equal_to_the_budget_fits_and_one_just_above_does_not():
    slots = [Slot(np.array([0.0, 1.0]), np.array([[0.0], [0.1]])), Slot(np.array([0.0, 1.0]), np.array([[0.0], [0.2]]))]
    total = 0.1 + 0.2
    assert budget.allocate(slots, np.array([total])) == [1, 1]
    assert budget.allocate(slots, np.array([total * (1 - 1e-12)])) != [1, 1]


SCORES = {
    "heads": {"layer_0": np.array([3.0, 1, 2]), "layer_1": np.array([0.5, 0.25, 0.125])},
    "neurons": {"layer_0": np.array([0.1, 0.4, 0.2, 0.3]), "layer_1": np.array([0.1, 0.1, np.nan, 0.1])},
}
COSTS = Costs(
    np.array([0.2]),
    {
        kind: {name: np.arange(units + 1)[:, None] * 0.4 / units / 2 for name in ("layer_0", "layer_1")}
        for kind, units in (("heads", 3), ("neurons", 4))
    },
)


def lists(kept):
    return {kind: {name: each.astype(int).tolist() for name, each in layers.items()} for kind, layers in kept.items()}


def test_the_highest_scores_that_fit_stay():
    """Heads cost 1/15, neurons 1/20: three heads of layer 0, one of layer 1 and the best neuron use 0.52 of 0.2 + 0.32."""
    kept = budget.choose(SCORES, COSTS, 0.2 + 4 / 15 + 0.0501)
    assert lists(kept) == {
        "heads": {"layer_0": [1, 1, 1], "layer_1": [1, 0, 0]},
        "neurons": {"layer_0": [0, 1, 0, 0], "layer_1": [0, 0, 0, 0]},
    }
    assert COSTS.ratio(kept) == pytest.approx(0.2 + 4 / 15 + 0.05)
    assert COSTS.ratio({}) == pytest.approx(1.0)
    same = budget.choose(SCORES, COSTS, 1.0)["neurons"]["layer_1"]
    assert lists({"neurons": {"layer_1": same}})["neurons"]["layer_1"][:2] == [1, 1]


def test_uniform_layers_keep_equal_numbers():
    kept = budget.choose(SCORES, COSTS, 0.6, uniform=True)
    assert {kind: [int(each.sum()) for each in layers.values()] for kind, layers in kept.items()} == {
        "heads": [3, 3],
        "neurons": [0, 0],
    }
    assert COSTS.ratio(kept) == pytest.approx(0.6)
    uneven = SCORES | {"heads": {"layer_0": np.ones(3)}}
    costs = Costs(COSTS.fixed, {"heads": {"layer_0": COSTS.kept["heads"]["layer_0"]}, "neurons": COSTS.kept["neurons"]})
    among = budget.counts(uneven) | {"neurons": {"layer_0": [1, 4], "layer_1": [2, 4]}}
    with pytest.raises(InputError, match="different numbers of neurons"):
        budget.choose(uneven, costs, 0.5, among=among, uniform=True)


def test_a_budget_equal_to_the_cost_keeps_every_unit():
    draw = np.random.default_rng(0)
    for _ in range(20):
        table = {f"layer_{n}": np.cumsum([0, *draw.random(5)])[:, None] for n in range(3)}
        total = sum(float(each[-1, 0]) for each in table.values())
        costs = Costs(np.array([0.0]), {"heads": {name: each / total for name, each in table.items()}})
        kept = budget.choose({"heads": {name: np.ones(5) for name in table}}, costs, 1.0)
        assert all(each.all() for each in kept["heads"].values())


@pytest.mark.slow
def test_choice_among_even_scores_nearly_fills_the_budget():
    """Units of two sizes that score nearly alike never fill it; a search that would prove this ends at the limit of nodes."""
    draw, layers = np.random.default_rng(0), [f"layer_{n}" for n in range(6)]
    sizes, each = {"heads": 12, "neurons": 1536}, {"heads": np.array([51200, 59392]), "neurons": np.array([800, 800])}

    def table(kind):
        coordinates = np.sort(np.bincount(draw.integers(sizes[kind], size=256), minlength=sizes[kind]))[::-1, None]
        return np.concatenate([np.zeros((1, 2)), np.cumsum(each[kind] + coordinates, axis=0)])

    whole = sum(6 * sizes[kind] * each[kind] for kind in sizes)
    costs = Costs(
        np.zeros(2),
        {kind: {name: table(kind) / whole for name in layers} for kind in sizes},
    )
    scores = {kind: {name: 1 + 0.02 * draw.standard_normal(sizes[kind]) for name in layers} for kind in sizes}
    kept = budget.choose(budget.balanced(scores, costs), costs, 0.5)
    assert 0.49 < costs.ratio(kept).max() <= 0.5 + budget.ROUNDING
    assert all(each.any() for layers in kept.values() for each in layers.values())


def test_solver_that_fails_is_no_budget_that_is_too_small(monkeypatch):
    slots = [Slot(np.arange(3.0), np.arange(3.0)[:, None])]
    solve, limits = budget.scipy.optimize.milp, []

    def ended(*args, options, **more):
        limits.append(options["node_limit"])
        if len(limits) == 1:
            return budget.scipy.optimize.OptimizeResult(status=1, x=None, message="limit")
        return solve(*args, options=options, **more)

    monkeypatch.setattr(budget.scipy.optimize, "milp", ended)
    assert budget.allocate(slots, np.array([1.5])) == [1]
    assert limits == [budget.NODES, 10 * budget.NODES]
    failed = budget.scipy.optimize.OptimizeResult(status=4, x=None, message="numerical trouble")
    monkeypatch.setattr(budget.scipy.optimize, "milp", lambda *args, **more: failed)
    with pytest.raises(InputError, match="choice of units failed: numerical trouble; use a budget that differs"):
        budget.allocate(slots, np.array([1.5]))


def test_neurons_go_in_steps_and_heads_one_by_one():
    sizes = {"heads": {"layer_0": np.ones(3)}, "neurons": {"layer_0": np.ones(100)}}
    assert budget.counts(sizes)["heads"]["layer_0"] == [0, 1, 2, 3]
    assert budget.counts(sizes)["neurons"]["layer_0"][:3] == [0, 3, 6]
    assert budget.counts(sizes, multiple=48)["neurons"]["layer_0"] == [0, 48, 96, 100]


def test_balanced_kinds_have_one_score_per_cost():
    scaled = budget.balanced(SCORES, COSTS)
    for kind in SCORES:
        assert sum(np.nansum(each) for each in scaled[kind].values()) == pytest.approx(0.4)
    np.testing.assert_allclose(scaled["heads"]["layer_0"], SCORES["heads"]["layer_0"] * 0.4 / 6.875)


def with_heads(**heads):
    return SCORES | {"heads": SCORES["heads"] | heads}


@pytest.mark.parametrize(
    ("scores", "limit", "message"),
    [
        (SCORES, 0.19, r"budget is 0\.19 .* 0\.2 of it is left"),
        (with_heads(layer_0=np.ones(2)), 0.5, "2 scores, and costs of 3 units"),
        (with_heads(layer_7=np.ones(2)), 0.5, "costs of none units"),
        (with_heads(layer_0=np.array([1, np.inf, 0])), 0.5, "a score is inf"),
        (with_heads(layer_0=np.array([1, -1.0, 0])), 0.5, "a score is -1"),
        ({"heads": SCORES["heads"]}, 0.7, "neurons of layer_0: costs of 4 units, and no scores"),
        (SCORES | {"heads": {"layer_0": np.ones(3)}}, 0.7, "heads of layer_1: costs of 3 units, and no scores"),
        (SCORES | {"layers": np.ones(2)}, 0.7, "layers: scores .* costs of 0 layers"),
        (SCORES, np.nan, "budget is nan"),
    ],
)
def test_impossible_input_is_refused(scores, limit, message):
    with pytest.raises(InputError, match=message):
        budget.choose(scores, COSTS, limit)


def test_numbers_to_choose_from_are_checked():
    for heads in ({"layer_0": [0, 3]}, {"layer_0": [0, 4], "layer_1": [3]}, {"layer_0": [], "layer_1": [3]}):
        with pytest.raises(InputError, match="among: the numbers of heads of layer_"):
            budget.choose(SCORES, COSTS, 0.7, among=budget.counts(SCORES) | {"heads": heads})


def test_units_without_costs_are_refused():
    with pytest.raises(InputError, match="hidden: these units have no costs; expected heads, neurons"):
        COSTS.ratio({"hidden": np.zeros(4, bool)})


def test_a_choice_is_taken_only_with_the_choice_it_needs():
    """The best pair of choices costs less than the budget and is not allowed; every other combination is tried."""
    draw = np.random.default_rng(1)
    for _ in range(8):
        slots = [Slot(draw.random(3), draw.random((3, 1))) for _ in range(3)]
        needs = [((0, 0), (1, 2)), ((2, 1), (0, 0))]
        allowed = [
            (sum(slot.values[choice] for slot, choice in zip(slots, each, strict=True)), list(each))
            for each in itertools.product(range(3), repeat=3)
            if sum(slot.costs[choice, 0] for slot, choice in zip(slots, each, strict=True)) <= 1.2
            and all(each[slot] != choice or each[other] == needed for (slot, choice), (other, needed) in needs)
        ]
        expected = max(allowed)[1] if allowed else None
        assert budget.allocate(slots, np.array([1.2]), needs) == expected


LAYERED = Costs(COSTS.fixed - 0.1, {**COSTS.kept, "layers": {f"layer_{n}": np.array([[0.0], [0.05]]) for n in (0, 1)}})


@pytest.mark.parametrize("uniform", [False, True])
def test_a_layer_goes_where_it_loses_less_than_its_units(uniform):
    """Layer 1 as a whole scores 0.01 where its units sum up to 1.175: it goes, and layer 0 stays whole."""
    scores = SCORES | {"layers": np.array([7.0, 0.01])}
    kept = budget.choose(scores, LAYERED, 0.55 + 1e-9, uniform=uniform)
    assert kept["layers"].tolist() == [True, False]
    assert lists({kind: kept[kind] for kind in ("heads", "neurons")}) == {
        "heads": {"layer_0": [1, 1, 1]},
        "neurons": {"layer_0": [1, 1, 1, 1]},
    }
    assert LAYERED.ratio(kept) == pytest.approx(0.55)
    assert "layers" not in budget.choose(SCORES, LAYERED, 0.55)
    scores = SCORES | {"layers": np.array([7.0, 1.2])}
    assert "layers" not in budget.choose(scores, LAYERED, 1.0, uniform=uniform)


def test_scores_of_layers_are_checked():
    for scores, message in (
        (np.ones(3), r"shape \(3,\), and costs of 2"),
        (np.array([1, np.inf]), "layers: a score is inf"),
    ):
        with pytest.raises(InputError, match=message):
            budget.choose(SCORES | {"layers": scores}, LAYERED, 0.5)
    kept = budget.choose(SCORES | {"layers": np.array([7.0, np.nan])}, LAYERED, 0.55)
    assert kept["layers"].tolist() == [True, False]


def test_one_layer_stays():
    scores = SCORES | {"layers": np.zeros(2)}
    kept = budget.choose(scores, LAYERED, 0.15 + 1e-9)
    assert kept["layers"].sum() == 1
    with pytest.raises(InputError, match=r"fewest heads, neurons and layers 0\.15 of it"):
        budget.choose(scores, LAYERED, 0.14)


def test_a_layer_that_may_go_may_lose_all_units():
    scores, among = SCORES | {"layers": np.ones(2)}, budget.counts(SCORES)
    among["neurons"]["layer_1"] = [2, 4]
    with pytest.raises(InputError, match="numbers of neurons of layer_1 begin with 2; expected 0 first"):
        budget.choose(scores, LAYERED, 0.5, among=among)


def test_layers_score_the_sum_of_their_units():
    total = budget.with_layers(SCORES, LAYERED)["layers"]
    np.testing.assert_allclose(total, [6 + 1.0, 0.875 + 0.3])


def test_widths_are_multiples():
    assert budget.widths(384)[:2] + budget.widths(384)[-2:] == [24, 48, 360, 384]
    assert budget.widths(24, multiple=10) == [10, 20, 24]
    assert budget.widths(5) == [1, 2, 3, 4, 5]


UNITS = {
    "heads": {"layer_0": np.array([3.0, 1, 2]), "layer_1": np.array([0.5, 0.25, 0.125])},
    "neurons": {"layer_0": np.array([0.1, 0.4, 0.2, 0.3]), "layer_1": np.array([0.1, 0.1, 0.3, 0.1])},
}
HIDDEN = np.array([0.2, 2.0, np.nan, 0.4, 1.5, 0.1, 0.3, 1.0])
OF_UNITS = {
    kind: {name: np.arange(size + 1)[:, None] * 0.4 / size / 2 for name in ("layer_0", "layer_1")}
    for kind, size in (("heads", 3), ("neurons", 4))
}


def costs(width):
    """Costs that are in proportion to the width, but for a part that is always there."""
    share = width / 8
    tables = {kind: {name: each * share for name, each in layers.items()} for kind, layers in OF_UNITS.items()}
    return Costs(np.array([0.05 + 0.15 * share]), tables)


def value(kept):
    flags = kept.get("hidden", np.ones(8, bool))
    units = sum(UNITS[kind][name][kept[kind][name]].sum() for kind in UNITS for name in UNITS[kind])
    return float(units + np.nansum(HIDDEN[flags]))


def spent(kept):
    width = int(kept.get("hidden", np.ones(8, bool)).sum())
    return float(costs(width).ratio({kind: kept[kind] for kind in UNITS})[0])


@pytest.mark.parametrize("limit", [0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0])
def test_the_best_width_of_all_is_chosen(limit):
    """All combinations of widths and numbers of units are tried."""
    counts = budget.counts(UNITS)
    scores, among = UNITS | {"hidden": HIDDEN}, dict.fromkeys(range(1, 9), counts)
    kept = budget.choose_width(scores, {width: costs(width) for width in among}, limit, among=among)
    assert spent(kept) <= limit * (1 + budget.ROUNDING)
    best = 0.0
    gained = {
        (kind, name): np.concatenate([[0.0], np.cumsum(np.sort(each)[::-1])])
        for kind in UNITS
        for name, each in UNITS[kind].items()
    }
    for size in range(1, 9):
        most = np.sort(np.nan_to_num(HIDDEN))[::-1][:size].sum()
        for numbers in itertools.product(*(range(len(each)) for each in gained.values())):
            used = sum(OF_UNITS[kind][name][n, 0] for (kind, name), n in zip(gained, numbers, strict=True))
            if used * size / 8 + 0.05 + 0.15 * size / 8 <= limit * (1 + budget.ROUNDING):
                best = max(best, most + sum(each[n] for each, n in zip(gained.values(), numbers, strict=True)))
    assert value(kept) == pytest.approx(best, rel=budget.GAP)
    if limit >= 0.2:
        assert value(kept) >= value(budget.choose(UNITS, costs(8), limit))
    assert ("hidden" not in kept) == (limit == 1.0)


def test_budget_below_every_width_names_the_least():
    scores, by_width = UNITS | {"hidden": HIDDEN}, {width: costs(width) for width in (4, 8)}
    counts: dict[int, budget.Counts] = dict.fromkeys([4, 8], budget.counts(UNITS))
    with pytest.raises(InputError, match=r"fewest heads, neurons and hidden dimensions 0\.125 of it is left"):
        budget.choose_width(scores, by_width, 0.1, among=counts)
    for sizes, message in (
        ([], "the widths are .* expected some of 1 to 8"),
        ([0, 8], "the widths are .* expected some of 1 to 8"),
        ([9], "the widths are .* expected some of 1 to 8"),
        ([2, 4], r"the width 2 has no costs; expected costs of all of \[2, 4\]"),
    ):
        counts = dict.fromkeys(sizes, budget.counts(UNITS))
        with pytest.raises(InputError, match=message):
            budget.choose_width(scores, by_width, 0.5, among=counts)


def test_a_width_keeps_the_dimensions_of_the_highest_scores():
    kept = budget.dimensions(HIDDEN, [1, 3, 7, 8])
    assert [np.flatnonzero(each).tolist() for each in kept] == [[1], [1, 4, 7], [0, 1, 3, 4, 5, 6, 7], [*range(8)]]
    assert np.flatnonzero(budget.dimensions(np.ones(4), [2])[0]).tolist() == [0, 1]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("layered", [False, True])
def test_the_least_cost_is_the_lowest_budget_that_fits(uniform, layered):
    """Two costs by layers of different sizes; uniform layers go in the order of their scores."""
    draw = np.random.default_rng(3)
    tables = {
        kind: {name: np.cumsum(draw.random((size + 1, 2)), axis=0) / 50 for name in ("layer_0", "layer_1")}
        for kind, size in (("heads", 3), ("neurons", 4))
    }
    for layers in tables.values():
        for table in layers.values():
            table -= table[0]
    tables["layers"] = {
        name: np.array([[0.0, 0.0], cost]) for name, cost in (("layer_0", [0.2, 0.3]), ("layer_1", [0.1, 0.2]))
    }
    own = Costs(np.array([0.1, 0.05]), tables)
    scores = SCORES | ({"layers": np.array([2.0, 1.0])} if layered else {})
    fewest = 1 if uniform else 0
    among = {kind: {name: [fewest, 2, 3] for name in layers} for kind, layers in SCORES.items()}
    lowest = budget.least(scores, own, among=among, uniform=uniform)
    kept = budget.choose(scores, own, lowest, among=among, uniform=uniform)
    assert own.ratio(kept).max() == pytest.approx(lowest)
    with pytest.raises(InputError, match=f"{lowest:.4g} of it is left"):
        budget.choose(scores, own, lowest - 1e-6, among=among, uniform=uniform)


def test_balanced_dimensions_have_the_score_of_their_cost():
    """The part of the costs that grows with the width is 0.95."""
    scaled = budget.balanced_hidden(HIDDEN, costs(8), costs(2), 2)
    np.testing.assert_allclose(scaled, HIDDEN * 0.95 / 5.5)
