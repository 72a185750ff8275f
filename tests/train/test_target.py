"""Runs with a target: the ratio reached, targets that cannot be met, and resumption."""

import dataclasses
import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import tiny
from dsee_jax import models, tree
from dsee_jax.ckpt import folders
from dsee_jax.errors import InputError
from dsee_jax.prune import budget, costs, latency, sensitivity
from dsee_jax.runtime import files
from dsee_jax.train import loop, pruning, target
from dsee_jax.train.results import trained_head
from dsee_jax.train.setup import prepare

TAYLOR = {"prune__kind": "structured", "prune__score": "TAYLOR", "prune__calibration": 16}


@pytest.fixture
def timed(monkeypatch):
    """Replace measured times by made-up ones, in proportion to the width: 1 for every head and a tenth for every neuron, of 50
    in all."""
    calls = []

    def times(each, **options):
        calls.append(options)
        widths = [model.config.widths | {"hidden": model.config.hidden_size} for model in each]
        units = [sum(one["heads"]) - 3 + sum(one["neurons"]) / 10 - 4 for one in widths]
        return [(50 + of_units) * one["hidden"] / 24 for one, of_units in zip(widths, units, strict=True)]

    monkeypatch.setattr(latency, "times", times)
    return calls


def fails(folder, message, **overrides):
    with pytest.raises(InputError, match=message):
        loop.run(runs.config(folder, **overrides), say=lambda text: None)


def test_target_that_needs_no_cut_is_refused(tmp_path):
    """The zeros of a sparse model cost no FLOPs: nothing would go, and re-tuning would be all that the run does."""
    setup, spent, _ = prepared(tmp_path, prune__target__flops=0.9)
    target.check(setup)
    sparse = jax.tree.map(lambda leaf: leaf.at[::2].set(0) if leaf.ndim == 2 else leaf, setup.params)
    setup = setup._replace(params=sparse)
    now = target.of_setup(setup).ratio({}).max()
    assert now < 0.9 < spent.ratio({}).max()
    with pytest.raises(
        InputError, match=rf"target.flops is 0.9 of the dense model, .* has {now:.4g} of it before a cut"
    ):
        target.check(setup)


def test_target_that_cannot_be_met_is_refused_with_the_least(tmp_path):
    fails(
        tmp_path,
        r"prune\.target\.flops: .* 0\.2 of .* 0\.6676 of it is left",
        **TAYLOR,
        prune__target__flops=0.2,
        prune__uniform=True,
        prune__target__multiple=40,
    )
    fails(tmp_path, r"prune\.target\.parameters: .* of it is left", **TAYLOR, prune__target__parameters=0.1)
    least = r"prune\.target\.parameters: .* fewest heads, neurons and hidden dimensions 0\.0\d+ of it is left"
    fails(tmp_path, least, **TAYLOR, prune__target__parameters=0.01, prune__target__hidden=True)
    assert not (tmp_path / "run").exists()


def test_time_that_cannot_be_met_is_refused_and_measured_once(tmp_path, timed):
    """The refused run leaves the times alone, for a run with another target; another batch or model is measured again."""
    fails(tmp_path, r"prune\.target\.latency: .* 0\.5 of .* 0\.86 of it", **TAYLOR, prune__target__latency=0.5)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [folders.LATENCY]
    count = len(timed)
    fails(tmp_path, r"prune\.target\.latency: .* 0\.6 of .* 0\.86 of it", **TAYLOR, prune__target__latency=0.6)
    assert len(timed) == count
    options = {"prune__target__latency": 0.6, "train__batch_size": 4}
    fails(tmp_path, r"prune\.target\.latency: .* 0\.6 of .* 0\.86 of it", **TAYLOR, **options)
    assert len(timed) == 2 * count
    target.check(prepare(runs.config(tmp_path, **TAYLOR, prune__target__latency=0.9)))
    assert len(timed) == 3 * count
    options = {"prune__target__latency": 0.9, "model__dtype": "bfloat16"}
    target.check(prepare(runs.config(tmp_path, **TAYLOR, **options)))
    assert len(timed) == 4 * count
    # A copy of the times lets another run choose by them.
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run" / folders.LATENCY, tmp_path / "other")
    target.check(prepare(runs.config(tmp_path, **TAYLOR, **options, output_dir=str(tmp_path / "other"))))
    assert len(timed) == 4 * count


def test_interrupted_measurement_of_times_leaves_no_file(tmp_path, timed, monkeypatch):
    def dying(*args, **options):
        raise KeyboardInterrupt

    config = runs.config(tmp_path, **TAYLOR, prune__target__latency=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(latency, "times", dying)
        with pytest.raises(KeyboardInterrupt):
            loop.run(config, say=lambda text: None)
    assert not [*(tmp_path / "run").iterdir()]
    with pytest.raises(InputError, match="0.86 of it"):
        loop.run(config, say=lambda text: None)


@pytest.mark.parametrize("best", [0, 1])
def test_checked_target_is_met_whichever_layer_stays(tmp_path, best):
    """Uniform cuts drop layers by their scores, and the updates of layer 1 make it dearer than layer 0."""
    options = {
        **{"layers": 2, "prune__uniform": True, "prune__target__layers": True},
        **{"delta__targets": ["encoder/layer_1/.*/kernel"], "delta__rank": 8},
    }
    fails(tmp_path, r"0\.2662 of it is left", **TAYLOR, **options, prune__target__flops=0.187)
    setup, spent, scores = prepared(tmp_path, **options, prune__target__flops=0.2663)
    target.check(setup)
    scores["layers"] = np.eye(2)[best] + 1
    assert target.choose(setup, scores, spent)["layers"].sum() == 1


def with_budget(setup, **budget):
    """Return the setup with another number of its target."""
    prune = dataclasses.replace(setup.config.prune, target=dataclasses.replace(setup.config.prune.target, **budget))
    return setup._replace(config=dataclasses.replace(setup.config, prune=prune))


@pytest.mark.parametrize("kind", ["flops", "parameters"])
def test_checked_target_is_met_whichever_dimensions_stay(tmp_path, kind):
    """The first 16 of 24 dimensions are zeros without sparse values; the last 8, which score highest, have all of both."""
    options = {"prune__uniform": True, "prune__target__hidden": True, f"prune__target__{kind}": 0.5}
    setup, _, scores = prepared(tmp_path, **options, delta__nonzeros=40)
    scores["hidden"] = np.arange(24.0)
    flat = {path: np.array(leaf) for path, leaf in tree.flatten(setup.params).items()}
    for path, axes in models.hidden_axes(setup.model).items():
        for axis in axes:
            flat[path].swapaxes(0, axis)[:16] = 0
    places = np.stack(np.divmod(np.arange(16 * 24, 16 * 24 + 40), 24), axis=1).astype(np.int32)
    setup = setup._replace(params=tree.unflatten(flat), supports=jax.tree.map(lambda _: places, setup.supports))
    with pytest.raises(InputError) as error:
        target.check(with_budget(setup, **{kind: 1e-6}))
    least = re.search(r"(\S+) of it is left", str(error.value))
    assert least
    setup = with_budget(setup, **{kind: 1.001 * float(least[1])})
    target.check(setup)
    kept = target.choose(setup, scores, target.of_setup(setup))
    assert np.flatnonzero(kept["hidden"]).tolist() == [*range(16, 24)]


def prepared(folder, **overrides):
    """Return the setup of a run that cuts by magnitudes, the costs of its model, and made-up scores of all units."""
    setup = prepare(runs.config(folder, prune__kind="structured", prune__score="W", **overrides))
    spent = target.of_setup(setup)
    scores: dict[str, Any] = {
        kind: {name: np.random.default_rng(0).random(len(table) - 1) for name, table in layers.items()}
        for kind, layers in spent.kept.items()
        if kind != "layers"
    }
    return setup, spent, scores | {"hidden": np.random.default_rng(1).random(24)}


def chosen(folder, **overrides):
    """Return the numbers of the kept units of layer 0, without a run."""
    setup, spent, scores = prepared(folder, **overrides)
    kept = target.choose(setup, scores, spent)
    return {kind: int((each if kind == "hidden" else each["layer_0"]).sum()) for kind, each in kept.items()}


@pytest.mark.parametrize("uniform", [False, True])
def test_target_is_checked_without_solving_a_programme(tmp_path, monkeypatch, uniform):
    options = {"prune__target__hidden": True, "prune__target__layers": True, "prune__uniform": uniform}
    setup, _, _ = prepared(tmp_path, prune__target__flops=0.5, **options)
    monkeypatch.delattr(budget, "allocate")
    target.check(setup)


def test_costs_of_all_widths_are_counted_in_one_pass(tmp_path, monkeypatch):
    setup, spent, scores = prepared(tmp_path, prune__target__flops=0.3, prune__target__hidden=True)
    count, calls = costs.flops, []
    monkeypatch.setattr(costs, "flops", lambda *args, **options: calls.append(1) or count(*args, **options))
    assert target.choose(setup, scores, spent)["hidden"].sum() < 24
    assert len(calls) == 1


def test_scores_of_dimensions_add_up_to_the_parameters_that_all_of_them_cost(tmp_path):
    """Counted on the model without half of its dimensions, whose updates are cut with it."""
    setup, spent, scores = prepared(tmp_path, prune__target__parameters=0.5, prune__target__hidden=True)
    scaled = target.balanced(setup, scores["hidden"], spent)
    small = pruning.resize(setup, {"hidden": np.arange(24) < 12})

    def parameters(one):
        head = trained_head(one)
        flat = tree.flatten(one.params) | tree.flatten({"deltas": one.trained["deltas"]})
        return sum(leaf.size for path, leaf in flat.items() if path not in head)

    backbone = parameters(setup) - sum(leaf.size for leaf in jax.tree.leaves(setup.trained["deltas"]))
    assert scaled.sum() == pytest.approx(2 * (parameters(setup) - parameters(small)) / backbone)
    np.testing.assert_allclose(scaled / scaled.sum(), scores["hidden"] / scores["hidden"].sum())


def test_uniform_target_prefers_numbers_that_config_json_holds(tmp_path):
    """BERT's config.json has no size of a head: all heads stay as long as neurons suffice."""
    assert chosen(tmp_path, prune__uniform=True, prune__target__flops=0.7)["heads"] == 3
    assert chosen(tmp_path, prune__uniform=True, prune__target__flops=0.3)["heads"] < 3


def test_uniform_target_takes_widths_that_config_json_holds(tmp_path):
    """BERT's heads fill the width: 16 or 8 of the 24 dimensions stay with 2 or 1 heads of each layer."""
    numbers = {
        budget: chosen(tmp_path, prune__uniform=True, prune__target__flops=budget, prune__target__hidden=True)
        for budget in (0.9, 0.5, 0.2)
    }
    assert all(each.get("hidden", 24) == 8 * each["heads"] for each in numbers.values())
    assert numbers[0.2]["hidden"] < 24


@pytest.mark.parametrize(("hidden", "kept"), [(True, {"heads": 2, "hidden": 16}), (False, {"heads": 2})])
def test_uniform_target_leaves_a_width_that_config_json_cannot_hold(tmp_path, hidden, kept):
    """Three heads of eight entries do not fill 20 dimensions, and two fill 16; where the width stays, any number will do."""
    options: dict[str, Any] = {"prune__uniform": True, "prune__target__flops": 0.9, "prune__target__hidden": hidden}
    setup, _, scores = prepared(tmp_path, **options)
    small = pruning.resize(setup, {"hidden": np.arange(24) < 20})
    units = target.choose(small, scores | {"hidden": scores["hidden"][:20]}, target.of_setup(small))
    numbers = {kind: int((each if kind == "hidden" else each["layer_0"]).sum()) for kind, each in units.items()}
    assert {kind: number for kind, number in numbers.items() if kind != "neurons"} == kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("structured", marks=pytest.mark.exhaustive), "earlybert"])
def test_run_meets_its_target(tmp_path, kind):
    score = TAYLOR if kind == "structured" else {"prune__kind": "earlybert", "prune__search": 0.5}
    results, out = runs.run(tmp_path, **score, prune__target__flops=0.6, train__epochs=1, train__retune_epochs=0.5)
    stage = next(each for each in results["stages"] if each["name"] in ("prune", "draw"))
    assert stage["kept"] == results["kept"]
    assert stage["target"]["budget"] == 0.6
    example = results["flops_per_example"]
    assert 0.5 < max(results["flops_ratio"], example["final"] / example["dense"]) <= stage["target"]["reached"] <= 0.6
    logged = [record for record in files.read(out / folders.LOG) if "target" in record]
    assert [record["kept"] for record in logged] == [results["kept"]]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["TAYLOR", pytest.param("W", marks=pytest.mark.exhaustive)])
def test_run_may_lose_hidden_dimensions(tmp_path, score):
    options = TAYLOR | {"prune__score": score, "prune__target__parameters": 0.4, "prune__target__hidden": True}
    results, out = runs.run(tmp_path, **options, train__epochs=0.2, train__retune_epochs=0.2)
    left, record = results["kept"]["hidden"], results["stages"][1]
    assert left < 24
    assert record["kept"] == results["kept"]
    assert 0.3 < results["parameters_ratio"] <= record["target"]["reached"] <= 0.4
    assert json.loads((out / "model" / "config.json").read_text())["hidden_size"] == left


@pytest.mark.exhaustive
def test_run_that_dies_after_the_cut_gives_the_same_result(tmp_path, timed, monkeypatch):
    options = TAYLOR | {"prune__target__latency": 0.5, "prune__target__hidden": True}
    options |= {"train__epochs": 0.5, "train__retune_epochs": 0.5}
    results, out = runs.run(tmp_path, **options)
    measured = len(timed)
    record = results["stages"][1]["target"]
    assert record["reached"] <= 0.5
    assert results["kept"]["hidden"] < 24
    assert record["measured"] == pytest.approx(record["reached"])
    append = files.append

    def dying(path, line):
        append(path, line)
        if line["stage"] == "prune":
            raise KeyboardInterrupt

    again = runs.config(tmp_path, **options, output_dir=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            loop.run(again, say=lambda text: None)
    loop.run(again, say=lambda text: None)
    assert runs.figures(tmp_path / "again") == runs.figures(out)
    assert len(timed) == 2 * measured, "the resumed run measured again"
    assert json.loads((out / folders.LATENCY).read_text())["rows"] == 8


@pytest.mark.slow
def test_run_may_drop_layers(tmp_path, monkeypatch):
    """With a layer that scores 0 the run drops it and keeps all units of the other one."""
    tiny.bert(tmp_path / "base", num_hidden_layers=2, head=False)
    runs.table(tmp_path / "data")
    taylor = sensitivity.taylor

    def harmless(*args, **options):
        scores = taylor(*args, **options)
        return scores | {"layers": jnp.array([2 * sum(map(jnp.sum, jax.tree.leaves(scores))), 0.0])}

    monkeypatch.setattr(sensitivity, "taylor", harmless)
    options = TAYLOR | {"prune__target__flops": 0.6, "prune__target__layers": True, "delta__nonzeros": 0}
    results, out = runs.run(tmp_path, **options, train__epochs=0.2, train__retune_epochs=0.2)
    assert results["kept"] == {"heads": [3], "neurons": [40], "layers": 1}
    record = results["stages"][1]
    assert record["kept"] == results["kept"]
    assert record["target"]["reached"] == pytest.approx(results["flops_ratio"], abs=0.01)
    assert json.loads((out / "model" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prune__target__flops": 0.5}, "unstructured.*cuts nothing out"),
        (
            {"prune__kind": "structured", "prune__target__flops": 0.5, "prune__heads": 1},
            r"prune\.heads is 1; the target",
        ),
        (
            {"prune__target__flops": 0.5, "prune__target__latency": 0.5},
            r"target\.flops and prune\.target\.latency are set",
        ),
        ({"prune__target__flops": 1.0}, r"prune\.target\.flops is 1\.0; expected a fraction"),
        ({"prune__target": 0.5}, r"'prune\.target' is a section of keys, found 0\.5"),
        ({"prune__target__speed": 2}, r"unknown key 'prune\.target\.speed'.* flops, parameters, latency"),
        (
            {"prune__kind": "structured", "prune__target__flops": 0.5, "prune__score": "ABS"},
            "with and without an update",
        ),
        (
            {"prune__kind": "earlybert", "prune__target__flops": 0.5, "prune__target__layers": True},
            r"prune\.target\.layers is True; expected false for earlybert",
        ),
    ],
)
def test_impossible_targets_are_refused(tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        runs.config(tmp_path, **overrides)
