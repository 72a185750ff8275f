"""The hidden width: coefficients of its dimensions, and the width of the highest total score within a budget."""

import itertools

import numpy as np
import pytest

from cut_models import close, families, logits, whole
from dsee_jax import models, prune
from dsee_jax.errors import InputError
from dsee_jax.prune import budget, width
from dsee_jax.prune.budget import Costs

KEPT = np.arange(24) % 3 > 0


@families("bert")
def test_coefficients_of_zero_compute_the_model_without_the_dimensions(family):
    model, params, _ = whole(family)
    stay = KEPT if model.task == "features" else slice(None)
    with prune.masked(model, {"hidden": KEPT}):
        expected = logits(model, params)[..., stay]
    with width.weighted(KEPT.astype(np.float32), models.hidden_axes(model)):
        close(logits(model, params)[..., stay], expected)
    plain = logits(model, params)[..., stay]
    with width.weighted(np.ones(24, np.float32), models.hidden_axes(model)):
        close(logits(model, params)[..., stay], plain)
    assert not np.allclose(plain, expected, atol=1e-3)


def test_block_without_a_call_is_refused():
    model, *_ = whole("bert")
    message, axes = "reached no 'classifier/kernel", models.hidden_axes(model)
    with pytest.raises(InputError, match=message), width.weighted(np.ones(24), axes):
        pass


def test_widths_are_multiples():
    assert width.widths(384)[:2] + width.widths(384)[-2:] == [24, 48, 360, 384]
    assert width.widths(24, multiple=10) == [10, 20, 24]
    assert width.widths(5) == [1, 2, 3, 4, 5]


SCORES = {
    "heads": {"layer_0": np.array([3.0, 1, 2]), "layer_1": np.array([0.5, 0.25, 0.125])},
    "neurons": {"layer_0": np.array([0.1, 0.4, 0.2, 0.3]), "layer_1": np.array([0.1, 0.1, 0.3, 0.1])},
}
HIDDEN = np.array([0.2, 2.0, np.nan, 0.4, 1.5, 0.1, 0.3, 1.0])
TABLES = {
    kind: {name: np.arange(size + 1)[:, None] * 0.4 / size / 2 for name in ("layer_0", "layer_1")}
    for kind, size in (("heads", 3), ("neurons", 4))
}


def costs(flags):
    """Costs that are in proportion to the width, but for a part that is always there."""
    share = np.mean(flags)
    tables = {kind: {name: each * share for name, each in layers.items()} for kind, layers in TABLES.items()}
    return Costs(np.array([0.05 + 0.15 * share]), tables)


def value(kept):
    flags = kept.get("hidden", np.ones(8, bool))
    units = sum(SCORES[kind][name][kept[kind][name]].sum() for kind in SCORES for name in SCORES[kind])
    return float(units + np.nansum(HIDDEN[flags]))


def spent(kept):
    flags = kept.get("hidden", np.ones(8, bool))
    return float(costs(flags).ratio({kind: kept[kind] for kind in SCORES})[0])


@pytest.mark.parametrize("limit", [0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0])
def test_the_best_width_of_all_is_chosen(limit):
    """All combinations of widths and numbers of units are tried."""
    counts = budget.counts(SCORES)
    kept = width.choose(SCORES | {"hidden": HIDDEN}, costs, limit, among=dict.fromkeys(range(1, 9), counts))
    assert spent(kept) <= limit * (1 + budget.ROUNDING)
    best = 0.0
    gained = {
        (kind, name): np.concatenate([[0.0], np.cumsum(np.sort(each)[::-1])])
        for kind in SCORES
        for name, each in SCORES[kind].items()
    }
    for size in range(1, 9):
        most = np.sort(np.nan_to_num(HIDDEN))[::-1][:size].sum()
        for numbers in itertools.product(*(range(len(each)) for each in gained.values())):
            used = sum(TABLES[kind][name][n, 0] for (kind, name), n in zip(gained, numbers, strict=True))
            if used * size / 8 + 0.05 + 0.15 * size / 8 <= limit * (1 + budget.ROUNDING):
                best = max(best, most + sum(each[n] for each, n in zip(gained.values(), numbers, strict=True)))
    assert value(kept) == pytest.approx(best, rel=budget.GAP)
    if limit >= 0.2:
        assert value(kept) >= value(budget.choose(SCORES, costs(np.ones(8, bool)), limit))
    assert ("hidden" not in kept) == (limit == 1.0)


def test_budget_below_every_width_names_the_least():
    counts: dict[int, budget.Counts] = dict.fromkeys([4, 8], budget.counts(SCORES))
    with pytest.raises(InputError, match=r"fewest heads, neurons and hidden dimensions 0\.125 of it is left"):
        width.choose(SCORES | {"hidden": HIDDEN}, costs, 0.1, among=counts)
    for sizes in ([], [0, 8], [9]):
        counts = dict.fromkeys(sizes, budget.counts(SCORES))
        with pytest.raises(InputError, match="the widths are .* expected some of 1 to 8"):
            width.choose(SCORES | {"hidden": HIDDEN}, costs, 0.5, among=counts)


def test_balanced_dimensions_have_the_score_of_their_cost():
    """The part of the costs that grows with the width is 0.95."""
    scaled = width.balanced(HIDDEN, costs(np.ones(8)), costs(np.arange(8) < 2), 2)
    np.testing.assert_allclose(scaled, HIDDEN * 0.95 / 5.5)
