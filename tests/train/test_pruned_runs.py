"""Complete runs with pruning on a tiny checkpoint: N:M, structured, EarlyBERT, gradual schedules."""

import gc
import itertools
import json
import weakref

import jax
import numpy as np
import pytest

from dsee_jax import tree
from dsee_jax.ckpt import adapter, hf, kept_units
from dsee_jax.deltas.adapter import kernels
from dsee_jax.export.run import export_run
from dsee_jax.prune import earlybert
from dsee_jax.runtime import files
from dsee_jax.train import finished_run, loop, pruning, sharding, stages, step
from runs import run


def test_run_with_n_m_masks(tmp_path):
    results, out = run(
        tmp_path, prune__kind="nm", train__epochs=0.2, train__retune_epochs=0.2, delta__targets=["pruned"]
    )
    assert results["weight_sparsity"] == 0.5
    assert [*kernels(adapter.load(out / "adapter").deltas)] == [*tree.flatten(adapter.load(out / "adapter").masks)]
    for mask in tree.flatten(adapter.load(out / "adapter").masks).values():
        np.testing.assert_array_equal(mask.reshape(-1, 4, mask.shape[1]).sum(1), 2)


def test_run_with_structured_pruning(tmp_path):
    """One of three heads and 16 of 40 neurons are pruned: arrays and figures are smaller."""
    results, out = run(tmp_path, prune__kind="structured", prune__heads=1, prune__neurons=0.4, train__epochs=1)
    kernels, left = 4 * 24 * 24 + 2 * 24 * 40, 4 * 24 * 16 + 2 * 24 * 24
    assert results["kept"] == {"heads": [2], "neurons": [24]}
    assert results["weight_sparsity"] == pytest.approx(1 - left / kernels)
    kept = adapter.load(out / "adapter")
    assert kept.masks == {}
    assert kept.config["kept"] == results["kept"]
    factors = sum(leaf.size for leaf in tree.flatten(kept.deltas).values())
    # Query and value are 24 x 16; sparse values of removed columns are removed.
    assert 2 * 2 * (24 + 16) <= factors <= 2 * (2 * (24 + 16) + 5)
    assert results["flops_per_token"] == {"dense": 2 * kernels, "final": 2 * (left + factors)}
    # Attention: 16 entries of the kept heads, with each of 16 positions, for scores and for mixing.
    assert results["flops_per_example"] == {
        "length": 16,
        "dense": 2 * 16 * (kernels + 2 * 16 * 24),
        "final": 2 * 16 * (left + factors + 2 * 16 * 16),
    }
    assert results["trainable_parameters"] == 2 * (2 * (24 + 24) + 5)
    fields = json.loads((out / "model" / "config.json").read_text())
    assert (fields["kept_heads"], fields["kept_neurons"], fields["intermediate_size"]) == ([2], [24], 24)
    units = tree.flatten(kept_units.read(out / "model"))
    assert {path: int(flags.sum()) for path, flags in units.items()} == {"heads/layer_0": 2, "neurons/layer_0": 24}
    _, before = hf.load_pretrained(tmp_path / "base")
    _, after = hf.load_pretrained(out / "model")
    up = lambda params: np.asarray(params["encoder"]["layer_0"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(up(after), up(before)[:, units["neurons/layer_0"]])


@pytest.mark.smoke
def test_run_with_earlybert(tmp_path):
    """Search, draw, rewind, tune: the smaller model has the pretrained values of the kept units."""
    results, out = run(
        tmp_path, prune__kind="earlybert", prune__heads=1, prune__neurons=0.4, prune__search=0.8, prune__check_every=2,
        delta__targets=["pruned"],
    )  # fmt: skip
    assert [stage["name"] for stage in results["stages"]] == ["draw", "tune"]
    assert results["kept"] == {"heads": [2], "neurons": [24]}
    assert not adapter.load(out / "adapter").masks
    log = [record for record in files.read(out / loop.LOG) if record["stage"] == "search"]
    checks = [record for record in log if "kept" in record]
    # 4 of 5 steps an epoch.
    assert [record["step"] for record in checks] == [2, 4]
    assert checks[0]["distance"] == {}
    assert all(0 <= distance <= 1 for distance in checks[1]["distance"].values())
    # The warm-up ends at step 0.4 of 4; then the rate is constant.
    assert log[-2]["learning_rate"] == pytest.approx(1e-2)
    learned = np.asarray(checks[-1]["coefficients"]["heads"]["layer_0"])
    assert learned.shape == (3,)
    assert (learned != 1).all()
    kept = kept_units.read(out / "model")
    np.testing.assert_array_equal(kept["heads"]["layer_0"], learned > learned.min())
    assert earlybert.packed(kept) == checks[-1]["kept"]
    _, before = hf.load_pretrained(tmp_path / "base")
    _, after = hf.load_pretrained(out / "model")
    up = lambda params: np.asarray(params["encoder"]["layer_0"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(up(after), up(before)[:, kept["neurons"]["layer_0"]])


@pytest.mark.slow
def test_run_with_fewer_layers_and_less_width_is_an_ordinary_model(tmp_path):
    """Two heads of eight entries fill the width that is left; the states of the tuned model teach the layers that stay."""
    results, out = run(
        tmp_path, layers=3, prune__kind="structured", prune__layers=2, prune__hidden=8, prune__heads=1, prune__neurons=0.4,
        prune__uniform=True, train__epochs=0.4, train__retune_epochs=0.4, train__distill__weight=0.5,
        train__distill__hidden=1.0,
    )  # fmt: skip
    assert results["kept"] == {"heads": [2], "neurons": [24], "layers": 1, "hidden": 16}
    kernels, left = 3 * (4 * 24 * 24 + 2 * 24 * 40), 4 * 16 * 16 + 2 * 16 * 24
    assert results["weight_sparsity"] == pytest.approx(1 - left / kernels)
    factors = sum(leaf.size for leaf in tree.flatten(adapter.load(out / "adapter").deltas).values())
    assert results["flops_per_token"] == {"dense": 2 * kernels, "final": 2 * (left + factors)}
    fields = json.loads((out / "model" / "config.json").read_text())
    assert "kept_head_size" not in fields
    assert [fields[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")] == [16, 1, 2]
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    kept = kept_units.read(out / "model")
    _, before = hf.load_pretrained(tmp_path / "base")
    _, after = hf.load_pretrained(out / "model")
    up = lambda params, number: np.asarray(params["encoder"][f"layer_{number}"]["mlp"]["up"]["kernel"])
    number = int(np.flatnonzero(kept["layers"])[0])
    rows, columns = kept["hidden"], kept["neurons"][f"layer_{number}"]
    np.testing.assert_array_equal(up(after, 0), up(before, number)[np.ix_(rows, columns)])


@pytest.mark.slow
def test_ticket_is_tuned_from_pretrained_weights(tmp_path, monkeypatch):
    """Full fine-tuning changes every weight in the search; tuning starts from the pretrained values."""
    begun = []
    tune = stages.STAGES["tune"]

    def watched(session, state):
        begun.append(jax.tree.map(np.array, state.trained["params"]))
        return tune(session, state)

    monkeypatch.setitem(stages.STAGES, "tune", watched)
    _, out = run(
        tmp_path, prune__kind="earlybert", prune__heads=1, prune__search=1, train__epochs=0.2,
        delta__rank=0, delta__nonzeros=0, train__full=True, train__learning_rate=1e-2,
    )  # fmt: skip
    (start,) = begun
    _, before = hf.load_pretrained(tmp_path / "base")
    columns = np.repeat(kept_units.read(out / "model")["heads"]["layer_0"], 8)
    kernel = lambda params: np.asarray(params["encoder"]["layer_0"]["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(kernel(start), kernel(before)[:, columns])


@pytest.mark.slow
def test_search_ends_when_the_mask_is_stable(tmp_path):
    """Every distance is less than 1, so two checks after the first end the search; the penalty lowers every coefficient."""
    results, out = run(
        tmp_path, prune__kind="earlybert", prune__neurons=0.4, prune__search=2, prune__check_every=1,
        prune__tolerance=1, prune__patience=2, prune__penalty=100, delta__rank=0, delta__nonzeros=0,
        train__full=True, train__learning_rate=1e-3,
    )  # fmt: skip
    assert results["stages"][0]["steps"] == 3
    assert results["kept"] == {"heads": [3], "neurons": [24]}
    last = files.read(out / loop.LOG)[3 * 2]
    assert (last["stage"], last["step"]) == ("search", 3)
    assert all(max(values) < 1 for layers in last["coefficients"].values() for values in layers.values())


@pytest.mark.slow
def test_full_fine_tuning_and_second_pruning_of_a_compact_model(tmp_path):
    """Every weight of the smaller model is tuned; a run that starts from the compact checkpoint prunes it again."""
    cut = {"prune__kind": "structured", "prune__scope": "global", "train__epochs": 0.2, "train__retune_epochs": 0.2}
    full = {"delta__rank": 0, "delta__nonzeros": 0, "train__full": True, "train__learning_rate": 1e-3}
    results, out = run(tmp_path, prune__heads=3, prune__neurons=10, **cut, **full)
    assert results["kept"] == {"heads": [0], "neurons": [30]}
    assert not (out / "adapter").exists()
    again, _ = run(
        tmp_path, prune__neurons=0.5, model__path=str(out / "model"), output_dir=str(tmp_path / "again"),
        delta__targets=[".*/mlp/(up|down)/kernel"], **cut,
    )  # fmt: skip
    assert again["kept"] == {"heads": [0], "neurons": [15]}
    first, both = (tree.flatten(kept_units.read(folder / "model")) for folder in (out, tmp_path / "again"))
    assert [flags.sum() for flags in both.values()] == [0, 15]
    assert not (both["neurons/layer_0"] & ~first["neurons/layer_0"]).any()
    emptied, _ = run(
        tmp_path, prune__neurons=40, output_dir=str(tmp_path / "empty"), delta__targets=[".*/mlp/up/kernel"], **cut
    )
    assert emptied["kept"] == {"heads": [3], "neurons": [0]}
    assert adapter.load(tmp_path / "empty" / "adapter").deltas == {}
    assert finished_run.evaluate(tmp_path / "empty") == pytest.approx(emptied["final"], rel=1e-5)
    export_run(tmp_path / "empty", tmp_path / "exported")


@pytest.mark.slow
def test_masks_of_a_cubic_schedule_only_shrink(tmp_path, monkeypatch):
    """Masks are drawn again in the re-tuning, each within its predecessor; the last has the full sparsity."""
    drawn = []
    draw = pruning.draw

    def watched(*args):
        drawn.append(tree.flatten(draw(*args)))
        return tree.unflatten(drawn[-1])

    monkeypatch.setattr(pruning, "draw", watched)
    results, out = run(
        tmp_path,
        prune__schedule="cubic",
        prune__schedule_updates=4,
        delta__targets=["pruned"],
        prune__sparsity=0.75,
        train__epochs=0.2,
        train__eval_every=1,
    )
    assert len(drawn) == 4
    for earlier, later in itertools.pairwise(drawn):
        for path in earlier:
            assert not np.any(np.asarray(later[path]) & ~np.asarray(earlier[path]))
    sizes = [1 - sum(int(m.sum()) for m in masks.values()) / sum(m.size for m in masks.values()) for masks in drawn]
    np.testing.assert_allclose(sizes, [0.75 * (1 - (1 - t) ** 3) for t in (0.25, 0.5, 0.75, 1)], atol=2e-4)
    assert results["weight_sparsity"] == 0.75
    # No evaluation before the last pruning, at step 4 of 10, can be the best.
    assert results["stages"][-1]["best_step"] > 4
    assert tree.flatten(adapter.load(out / "adapter").masks).keys() == drawn[-1].keys()


@pytest.mark.parametrize(("schedule", "epochs"), [("one_shot", 0), ("cubic", 0), ("cubic", 0.2)])
def test_short_retuning_reaches_the_full_sparsity(tmp_path, schedule, epochs):
    """Without steps, or with one step, for ten updates the stage prune reaches the full sparsity."""
    results, _ = run(tmp_path, prune__schedule=schedule, train__epochs=0.2, train__retune_epochs=epochs)
    assert [stage["name"] for stage in results["stages"]] == ["tune", "prune", "retune"][: 3 if epochs else 2]
    assert results["weight_sparsity"] == 0.5


@pytest.mark.slow
def test_redraw_frees_the_frozen_weights_before_it(tmp_path, monkeypatch):
    """One name too many keeps a second copy of all pruned kernels on the device until the end of the stage."""
    place, references, alive = sharding.place, [], []

    def watched(placed, values):
        placed_values = place(placed, values)
        if isinstance(placed_values, step.Frozen):
            gc.collect()
            alive.append([reference() is not None for reference in references])
            kernel = placed_values.params["encoder"]["layer_0"]["mlp"]["up"]["kernel"]
            references.append(weakref.ref(kernel))
        return placed_values

    monkeypatch.setattr(sharding, "place", watched)
    run(tmp_path, prune__schedule="cubic", prune__schedule_updates=3, train__epochs=0.2)
    # The calls: tune (the pretrained kernel itself, which stays), retune and two redraws.
    assert alive[-1] == [True, False, True]
