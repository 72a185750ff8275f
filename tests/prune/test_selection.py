"""The choice of kept units: layers and hidden dimensions by scores, each kind among the units that are left."""

import jax
import numpy as np
import pytest

from cut_models import HEADS, NEURONS, whole
from dsee_jax import prune, tree
from dsee_jax.errors import InputError

LAYERS, WIDTH = 3, 24


def given():
    """Return scores of every unit: layer 1 is the lowest, then head 2 and neuron 0 of layer 2, then dimensions 5 and 7."""
    heads, neurons = np.ones((LAYERS, HEADS)), np.ones((LAYERS, NEURONS))
    heads[2, 2] = neurons[2, 0] = 0
    scores = {
        kind: {f"layer_{number}": row for number, row in enumerate(table)}
        for kind, table in (("heads", heads), ("neurons", neurons))
    }
    return scores | {"layers": np.array([3.0, 1, 2]), "hidden": np.where(np.isin(np.arange(WIDTH), [5, 7]), 0.0, 1)}


def test_units_are_chosen_among_those_that_earlier_kinds_leave():
    """Layer 2 is layer 1 after the cut; its units keep their name before the cut."""
    model, params, _ = whole("bert", LAYERS)
    kept = prune.select(model, params, None, layers=1, heads=1, neurons=1, hidden=2, score=given())
    assert kept["layers"].tolist() == [True, False, True]
    assert {path: np.flatnonzero(~flags).tolist() for path, flags in tree.flatten(kept).items()} == {
        "heads/layer_0": [],
        "heads/layer_2": [2],
        "neurons/layer_0": [],
        "neurons/layer_2": [0],
        "layers": [1],
        "hidden": [5, 7],
    }


def test_score_of_a_layer_adds_the_shares_of_heads_and_of_neurons():
    """ABS of query and value has no neurons: they score W, in other units than the updates."""
    model, params, adapter = whole("bert", LAYERS)
    flat = tree.flatten(params)
    size = lambda number, name: np.abs(flat[f"encoder/layer_{number}/{name}/kernel"]).sum()
    shares = [np.array([sum(size(number, name) for name in names) for number in range(LAYERS)])
              for names in (("attention/query", "attention/value"), ("mlp/up",))]  # fmt: skip
    lowest = np.argsort(sum(share / share.sum() for share in shares))
    for count in (1, 2):
        kept = prune.select(model, params, None, layers=count, score="W")["layers"]
        assert set(np.flatnonzero(~kept)) == set(lowest[:count])
    assert prune.select(model, params, adapter, layers=0.3, score="ABS")["layers"].sum() == 2


def test_score_of_a_hidden_dimension_sums_the_weights_that_read_or_write_it():
    model, params, _ = whole("bert", LAYERS)
    total = np.zeros(WIDTH)
    for path, w in tree.flatten(params).items():
        if path.endswith("/kernel") and "layer_" in path:
            total += np.abs(w).sum(0 if path.endswith(("output/kernel", "down/kernel")) else 1)
    kept = prune.select(model, params, None, hidden=0.25, score="W")["hidden"]
    assert set(np.flatnonzero(~kept)) == set(np.argsort(total)[:6])


def test_layers_keep_updates_of_their_own_ranks():
    """A PEFT adapter may have a rank per layer. Layer 0 goes, and layer 1, of another rank, gets its number."""
    model, params, adapter = whole("bert", LAYERS)
    padded = {path: np.array(leaf) for path, leaf in tree.flatten(adapter.deltas).items()}
    padded |= {path: 9 * leaf for path, leaf in padded.items() if path.endswith("/b") and "layer_0" not in path}
    own = dict(padded)
    for path in (path for path in padded if "layer_0" in path and path.endswith(("/a", "/b"))):
        axis = int(path.endswith("/a"))
        np.moveaxis(padded[path], axis, 0)[1] = 0
        own[path] = padded[path].take([0], axis)
    by_rank = [adapter.replace(deltas=tree.unflatten(deltas), scale=2.0) for deltas in (padded, own)]
    options = {"layers": 1, "heads": 1, "neurons": 0.3, "hidden": 4}
    expected, kept = (tree.flatten(prune.select(model, params, each, **options)) for each in by_rank)
    assert kept["layers"].tolist() == [False, True, True]
    assert kept.keys() == expected.keys()
    for path, flags in kept.items():
        np.testing.assert_array_equal(flags, expected[path])


def test_random_units_depend_on_the_key():
    model, params, _ = whole("bert", LAYERS)
    drawn = [
        prune.select(model, params, None, layers=1, hidden=12, score="random", key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    first, again, other = (np.concatenate([kept["layers"], kept["hidden"]]) for kept in drawn)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "layers is 3: all 3 layers of the model would go; keep one or more"),
        ({"layers": 0.9}, "layers is 0.9: all 3 layers"),
        ({"layers": 4}, "layers is 4 and there are 3 to compare"),
        ({"hidden": 24}, "hidden is 24: all 24 hidden dimensions of the model would go"),
        ({"layers": 1, "score": {"layers": np.ones(2)}}, r"scores of layers have the shape \(2,\); the model has 3"),
    ],
)
def test_impossible_amounts_are_named(options, message):
    model, params, _ = whole("bert", LAYERS)
    with pytest.raises(InputError, match=message):
        prune.select(model, params, None, **{"score": "W", **options})
