"""The costs by kept units equal those that are counted on the cut model."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from dsee_jax import models, tree
from dsee_jax.ckpt import hf
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas import create
from dsee_jax.deltas.adapter import count
from dsee_jax.errors import InputError
from dsee_jax.metrics import flops
from dsee_jax.prune import compaction, costs, latency
from dsee_jax.prune.latency import Latency
from dsee_jax.typing import Units

KEY, PLAIN = jax.random.key(0), DeltaConfig(targets=["encoder/.*/kernel"], rank=2, nonzeros=0)
NUMBERS = {"heads": {"layer_0": 1, "layer_1": 2}, "neurons": {"layer_0": 7, "layer_1": 4}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return ``(model, params, adapter, kept)``; some weights are zero, and the kept units are the last ones."""
    model, params = hf.load_pretrained(tiny.bert(tmp_path_factory.mktemp("costs") / "base"))
    flat = dict(tree.flatten(params))
    path = "encoder/layer_1/mlp/up/kernel"
    flat[path] = jnp.asarray(flat[path]).at[:3].set(0)
    params = tree.unflatten(flat)
    config = DeltaConfig(targets=["encoder/.*/kernel"], rank=2, nonzeros=30, support="random")
    adapter = create.init(params, config, key=jax.random.key(0))
    sizes = {"heads": 3, "neurons": 40}
    kept = {
        kind: {name: np.arange(sizes[kind]) >= sizes[kind] - left for name, left in layers.items()}
        for kind, layers in NUMBERS.items()
    }
    return model, params, adapter, kept


def cut(model, params, adapter, kept):
    indices = compaction.indices(model, kept, adapter.deltas, adapter.supports)
    return compaction.cut_tree({"params": params, "deltas": adapter.deltas}, indices)


def test_flops_are_those_of_the_cut_model(made):
    model, params, adapter, kept = made
    paths = flops.kernels(model, params, {"classifier/kernel", "pooler/kernel"})
    spent = costs.flops(params, adapter, models.cuts(model), paths, length=16)
    small, heads = cut(model, params, adapter, kept), models.cuts(model)["heads"]
    left = [path for path in paths if path in tree.flatten(small["params"])]
    used = flops.sparse(small["params"], left) + count(small["deltas"])
    dense = flops.dense(params, paths)
    expected = [
        used / dense,
        flops.example(used, small["params"], heads, 16) / flops.example(dense, params, heads, 16),
    ]
    ratio = spent.ratio(kept)
    # Of the units that stay, those with the most coordinates of supports are counted.
    assert (ratio >= np.array(expected) - 1e-12).all()
    np.testing.assert_allclose(ratio, expected, atol=0.004)
    whole = flops.sparse(params, paths) + count(adapter.deltas)
    assert spent.ratio({})[0] == pytest.approx(whole / dense, abs=1e-12)


def test_the_last_unit_of_a_layer_costs_as_much_as_the_others(made):
    """Else a layer would be emptied for the factor of an update that does not depend on its units."""
    model, params, *_ = made
    adapter = create.init(params, PLAIN, key=KEY)
    spent = costs.parameters(params, adapter, models.cuts(model), tree.flatten(params))
    for layers in spent.kept.values():
        for table in layers.values():
            np.testing.assert_allclose(np.diff(table[:, 0]), table[1, 0], rtol=1e-9)
    empty = {
        kind: {name: np.zeros(len(each) - 1, bool) for name, each in spent.kept[kind].items()} for kind in spent.kept
    }
    empty.pop("layers")
    small = cut(model, params, adapter, empty)
    left = sum(leaf.size for leaf in tree.flatten(small).values()) / sum(leaf.size for leaf in jax.tree.leaves(params))
    assert left <= float(spent.ratio(empty)[0])


def test_zeros_of_kernels_that_training_fills_count(made):
    model, params, *_ = made
    path = "encoder/layer_1/mlp/up/kernel"
    paths = flops.kernels(model, params, {"classifier/kernel", "pooler/kernel"})
    skipped = costs.flops(params, None, models.cuts(model), paths, length=16)
    filled = costs.flops(params, None, models.cuts(model), paths, length=16, filled=[path])
    zeros = int(jnp.sum(tree.get(params, path) == 0))
    assert zeros
    assert filled.ratio({})[0] == pytest.approx(1.0)
    assert skipped.ratio({})[0] == pytest.approx(1 - zeros / flops.dense(params, paths))


def test_paths_are_checked(made):
    model, params, *_ = made
    for paths, message in (([], "no paths"), (["encoder/nothing/kernel"], "no 'encoder/nothing/kernel' in the tree")):
        with pytest.raises(InputError, match=message):
            costs.flops(params, None, models.cuts(model), paths, length=16)
        with pytest.raises(InputError, match=message):
            costs.parameters(params, None, models.cuts(model), paths)


def test_parameters_are_those_of_the_cut_model(made):
    model, params, adapter, kept = made
    backbone = [path for path in tree.flatten(params) if not path.startswith("classifier")]
    spent = costs.parameters(params, adapter, models.cuts(model), backbone)
    small = cut(model, params, adapter, kept)
    sizes = [leaf.size for path, leaf in tree.flatten(small["params"]).items() if path in backbone]
    total = sum(tree.flatten(params)[path].size for path in backbone)
    ratio = float(spent.ratio(kept)[0])
    assert (sum(sizes) + count(small["deltas"])) / total == pytest.approx(ratio, abs=0.004)
    plain = costs.parameters(params, None, models.cuts(model), backbone)
    assert sum(sizes) / total == pytest.approx(float(plain.ratio(kept)[0]), abs=1e-12)


def test_a_dropped_layer_costs_nothing(made):
    model, params, *_ = made
    adapter, flat = create.init(params, PLAIN, key=KEY), tree.flatten(params)
    spent = costs.parameters(params, adapter, models.cuts(model), flat)
    kept = {"layers": np.array([False, True]), "neurons": {"layer_1": np.ones(40, bool)}}
    left = sum(leaf.size for leaf in tree.flatten(cut(model, params, adapter, kept)).values())
    assert float(spent.ratio(kept)[0]) == pytest.approx(left / sum(leaf.size for leaf in flat.values()), abs=1e-12)


def test_costs_of_fewer_hidden_dimensions_are_those_of_the_cut_model(made):
    """Zeros, factors and coordinates along the dimensions that go are not counted."""
    model, params, adapter, kept = made
    flags, cuts, flat = np.arange(24) % 4 > 0, models.cuts(model), tree.flatten(params)
    narrow: dict[str, Any] = {"hidden": costs.Dimensions(models.hidden_axes(model), flags)}
    paths = flops.kernels(model, params, {"classifier/kernel", "pooler/kernel"})
    backbone = [path for path in flat if not path.startswith("classifier")]
    spent = costs.flops(params, adapter, cuts, paths, length=16, **narrow)
    filled = costs.flops(params, adapter, cuts, paths, length=16, filled=paths, **narrow)
    all_of_it = costs.parameters(params, adapter, cuts, backbone, **narrow)
    dense, every = flops.dense(params, paths), sum(flat[path].size for path in backbone)
    for units, tolerance in (({}, 1e-12), (kept, 0.004)):
        small = cut(model, params, adapter, units | {"hidden": flags})
        updates, own = count(small["deltas"]), tree.flatten(small["params"])
        used = flops.sparse(small["params"], paths) + updates
        longer = flops.example(used, small["params"], cuts["heads"], 16)
        expected = [used / dense, longer / flops.example(dense, params, cuts["heads"], 16)]
        np.testing.assert_allclose(spent.ratio(units), expected, atol=tolerance)
        whole = (flops.dense(small["params"], paths) + updates) / dense
        assert filled.ratio(units)[0] == pytest.approx(whole, abs=tolerance)
        left = sum(own[path].size for path in backbone)
        assert all_of_it.ratio(units)[0] == pytest.approx((left + updates) / every, abs=tolerance)


def test_one_pass_counts_the_costs_of_several_models(made):
    """Every array is read once, whatever the number of models."""
    model, params, adapter, _ = made
    several, cuts, axes = np.random.default_rng(0).random((3, 24)) < 0.6, models.cuts(model), models.hidden_axes(model)
    paths = flops.kernels(model, params, {"classifier/kernel", "pooler/kernel"})
    square = [*paths, "pooler/kernel"]
    for counted in (
        lambda hidden: costs.flops(params, adapter, cuts, square, length=16, hidden=hidden),
        lambda hidden: costs.flops(params, adapter, cuts, paths, length=16, filled=paths[:3], hidden=hidden),
        lambda hidden: costs.parameters(params, adapter, cuts, tree.flatten(params), hidden=hidden),
    ):
        together = counted(costs.Dimensions(axes, several)).models()
        for flags, one in zip(several, together, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, counted(costs.Dimensions(axes, flags)))


def test_the_bound_of_all_choices_of_dimensions_is_close_for_a_sparse_model(made):
    """It is above the costs of every choice, and below those of all dimensions: a target near the least would be refused."""
    model, params, _, _ = made
    rng, cuts, axes = np.random.default_rng(0), models.cuts(model), models.hidden_axes(model)
    paths = [*flops.kernels(model, params, {"classifier/kernel", "pooler/kernel"}), "pooler/kernel"]
    flat = {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}
    for path in paths:
        # The last dimensions have the most nonzero entries.
        rows = flat[path].swapaxes(0, axes[path][0])
        rows *= rng.random(rows.shape) < np.linspace(0, 0.3, 24)[:, None]
    sparse = tree.unflatten(flat)
    count = functools.partial(costs.flops, sparse, None, cuts, paths, length=16)
    whole = count().ratio({})
    for width in (6, 18, 23, 24):
        bound = count(hidden=costs.Dimensions(axes, np.arange(24) < width, most=True)).ratio({})
        assert (bound <= whole).all()
        some = np.stack([np.arange(24) >= 24 - width, *(rng.permutation(24) < width for _ in range(50))])
        each = [own.ratio({}) for own in count(hidden=costs.Dimensions(axes, some)).models()]
        assert (np.max(each, axis=0) <= bound).all()
        if width == 24:
            np.testing.assert_allclose(bound, whole)


def measured(heads, neurons, empty=2.0, one=2.0, last=8.0):
    """Made-up times of a model whose layers have 3 and 2 heads, and 4 and 8 neurons."""
    widths = {"heads": (3, 2), "neurons": (4, 8)}
    apart = {"heads": last, "neurons": 8.0}
    return Latency(1, 1, "cpu", widths, 10.0, empty, one, apart, {"heads": heads, "neurons": neurons})


def test_times_of_layers_follow_from_those_of_the_model():
    times = measured({0: 5.0, 2: 9.0, 3: 10.0}, {0: 7.0, 4: 9.0, 8: 10.0})
    # From 0 to 2 heads both layers gain, and from 2 to 3 only the first; neurons likewise at 4.
    np.testing.assert_allclose(times.layer_seconds("heads", 0, 3), [0, 1, 2, 3])
    np.testing.assert_allclose(times.layer_seconds("heads", 1, 2), [0, 1, 2])
    np.testing.assert_allclose(times.layer_seconds("neurons", 1, 8), [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])


def test_times_of_heads_and_neurons_add_up_to_the_whole():
    """Without heads 5 go and without neurons 3; without both not 8 but 6."""
    points = {0: 5.0, 2: 9.0, 3: 10.0}, {0: 7.0, 4: 9.0, 8: 10.0}
    np.testing.assert_allclose(measured(*points, empty=4.0).layer_seconds("heads", 0, 3), [0, 0.75, 1.5, 2.25])
    np.testing.assert_allclose(measured(*points, empty=10.5).layer_seconds("heads", 0, 3), 0)


def test_the_last_layer_has_times_of_its_own():
    """The 2 heads of the last layer take 1 instead of their share of 5, which is 2; those of the first then take 4."""
    times = measured({0: 5.0, 3: 10.0}, {0: 7.0, 8: 10.0}, last=9.0)
    np.testing.assert_allclose(times.layer_seconds("heads", 1, 2), [0, 0.5, 1])
    np.testing.assert_allclose(times.layer_seconds("heads", 0, 3), np.arange(4) * 4 / 3)


def test_the_rest_of_a_layer_is_the_time_without_its_units():
    points = {0: 5.0, 3: 10.0}, {0: 7.0, 8: 10.0}
    assert measured(*points, one=1.5).rest_of_layer() == 0.5
    assert measured(*points).rest_of_layer() == 0
    assert measured(*points, one=2.1).rest_of_layer() == 0
    assert measured(*points, one=0.0).rest_of_layer() == 1, "two layers take more than the 2 of both"


def test_a_wider_model_is_never_faster():
    noisy = measured({0: 5.0, 1: 9.0, 2: 8.0, 3: 10.0}, {0: 7.0, 8: 10.0})
    assert (np.diff(noisy.layer_seconds("heads", 0, 3)) >= 0).all()


@pytest.mark.slow
def test_measured_times_survive_json_and_become_costs(made, monkeypatch):
    monkeypatch.setattr(latency, "POINTS", 2)
    monkeypatch.setattr(latency, "SHORTEST", 0.0)
    model, params, *_ = made
    times = latency.measure(model, rows=2, length=4, layers=True, rounds=1)
    assert {kind: sorted(each) for kind, each in times.points.items()} == {"heads": [0, 3], "neurons": [0, 40]}
    assert Latency.from_json(json.loads(json.dumps(times.as_json()))) == times
    spent = costs.latency(times, params, models.cuts(model))
    assert spent.ratio({}) == pytest.approx(1.0)
    assert {name: table.shape for name, table in spent.kept["heads"].items()} == {"layer_0": (4, 1), "layer_1": (4, 1)}


def test_times_of_a_width_lie_between_those_of_the_model_with_and_without_units():
    points = {0: 5.0, 2: 9.0, 3: 10.0}, {0: 7.0, 4: 9.0, 8: 10.0}
    times = measured(*points)._replace(narrow={2: (4.0, 2.0), 4: (10.0, 2.0)})
    same, half, between = (times.of_width(size) for size in (4, 2, 3))
    assert same == times
    assert (half.seconds, half.empty, half.one, half.last["neurons"]) == (4.0, 2.0, 2.0, 3.5)
    # A quarter of the time of the units is left.
    np.testing.assert_allclose(half.layer_seconds("heads", 0, 3), times.layer_seconds("heads", 0, 3) / 4)
    assert between.seconds == 7.0
    cuts = {kind: [Units({f"layer_{n}": (0, 1)}, ()) for n in (0, 1)] for kind in ("heads", "neurons")}
    params = {"layer_0": np.zeros(2), "layer_1": np.zeros(2)}
    of = [costs.latency(times, params, cuts, width=size) for size in (2, 4)]
    together = costs.latency(times, params, cuts, width=np.array([2, 4])).models()
    jax.tree.map(np.testing.assert_array_equal, together, of)
    assert Latency.from_json(json.loads(json.dumps(times.as_json()))) == times
