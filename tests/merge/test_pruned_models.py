"""Structurally pruned models: equal kept units merge, different kept units are refused before anything is written."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

import checkpoints
import dsee_jax
import tiny
from dsee_jax import models
from dsee_jax.ckpt import adapter, folders, hf, hf_save, kept_units
from dsee_jax.prune import compaction, units
from merge import __main__ as command


@functools.cache
def kept(head):
    """Masks of kept units: all heads but ``head``, and no neurons in the last layer; equal widths for every ``head``."""
    flags = {f"layer_{layer}": np.arange(3) != head for layer in range(2)}
    return {"heads": flags, "neurons": {"layer_1": np.zeros(40, bool)}}


def family(folder, *heads):
    """Write ``dense``, and ``base``, ``model_0`` ... without these heads; return the masks of the base's kept units."""
    model, params = hf.load_pretrained(tiny.bert(folder / "dense"))
    for number, head in enumerate((heads[0], *heads)):
        small, weights = dsee_jax.compact(model, params, units.masks(params, models.cuts(model), kept(head)))
        draw = np.random.default_rng(number)
        weights = jax.tree.map(lambda leaf: np.asarray(leaf + number * 0.1 * draw.normal(size=leaf.shape)), weights)  # noqa: B023
        weights = jax.tree.map(lambda leaf: leaf.astype(np.float32), weights)
        out = folder / (f"model_{number - 1}" if number else "base")
        hf_save.save_pretrained(out, small, weights, source=folder / "dense", kept=kept(head))
    return kept(heads[0])


def logits(model, params):
    return np.asarray(dsee_jax.apply(model, params, None, tiny.batch()))


@pytest.mark.parametrize("method", ["linear", "rankmean", "task_arithmetic"])
def test_models_with_equal_kept_units_merge_to_a_compact_model(tmp_path, method):
    """The merged checkpoint is compact, loads, and expands to the dense shape."""
    kept_by_base = family(tmp_path, 1, 1)
    recipe = checkpoints.recipe(tmp_path, method, each={} if method == "rankmean" else {"weight": 1})
    assert command.main([str(recipe), str(tmp_path / "out")]) == 0
    assert kept_units.difference(kept_units.read(tmp_path / "out"), kept_by_base) is None
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    small, params = hf.load_pretrained(tmp_path / "out")
    assert (small.config.kept_heads, small.config.kept_neurons) == ((2, 2), (40, 0))
    if method == "linear":
        a, b = (hf.load_pretrained(tmp_path / f"model_{number}")[1] for number in range(2))
        jax.tree.map(lambda x, a, b: np.testing.assert_allclose(x, (a + b) / 2, atol=1e-6), params, a, b)
    dense_model, dense = compaction.expand(small, params, kept_units.read(tmp_path / "out"))
    hf_save.save_pretrained(tmp_path / "full", dense_model, dense, source=tmp_path / "out")
    assert "kept_heads" not in json.loads((tmp_path / "full" / "config.json").read_text())
    dense_logits = logits(*hf.load_pretrained(tmp_path / "full"))
    np.testing.assert_allclose(dense_logits, logits(small, params), atol=1e-5)
    assert "kept.safetensors" in (tmp_path / "out" / "merge_recipe.yml").read_text()


def refused(folder, recipe, capsys, *words):
    """Check that a merge and its plan fail with one line that holds the words, and write nothing."""
    before = set(folder.rglob("*"))
    for plan in ([], ["--plan"]):
        assert command.main([str(recipe), str(folder / "out"), *plan]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        for word in words:
            assert str(word) in printed.err
    assert set(folder.rglob("*")) == before


def test_equal_shapes_with_different_kept_heads_are_refused(tmp_path, capsys):
    family(tmp_path, 1, 2)
    recipe = checkpoints.recipe(tmp_path, "linear", each={"weight": 1})
    refused(tmp_path, recipe, capsys, tmp_path / "model_0", tmp_path / "model_1", "the heads of layer 0 differ")


def test_dense_base_of_compact_models_is_refused(tmp_path, capsys):
    family(tmp_path, 1, 1)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "dense").rename(tmp_path / "base")
    recipe = checkpoints.recipe(tmp_path, "task_arithmetic", each={"weight": 1})
    words = (tmp_path / "model_0", f"{tmp_path / 'base'} is not pruned: take the compact model", "--format hf")
    refused(tmp_path, recipe, capsys, *words)


def test_compact_model_without_its_kept_units_file_is_refused(tmp_path, capsys):
    family(tmp_path, 1, 1)
    (tmp_path / "model_1" / folders.KEPT).unlink()
    recipe = checkpoints.recipe(tmp_path, "linear", each={"weight": 1})
    refused(tmp_path, recipe, capsys, tmp_path / "model_1" / "kept.safetensors is missing")


def test_slices_of_pruned_models_are_refused(tmp_path, capsys):
    family(tmp_path, 1, 1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices: [{sources: [{model: model_0, layer_range: [0, 2]}]}, "
        "{sources: [{model: model_1, layer_range: [0, 1]}]}]\n"
    )
    refused(tmp_path, recipe, capsys, "is structurally pruned, layer by layer")


@pytest.mark.parametrize("head", [None, 1, 2])
def test_adapter_with_other_kept_units_than_its_base_is_refused(tmp_path, capsys, head):
    """Head 1 is pruned in the base; an adapter with head 2 pruned, or for the dense model, is refused."""
    family(tmp_path, 1, 1)
    model, params = hf.load_pretrained(tmp_path / "base")
    path = "encoder/layer_0/mlp/up/kernel"  # of one shape in all models
    config = dsee_jax.DeltaConfig(targets=(path,), rank=2, nonzeros=0)
    updates = dsee_jax.deltas.init(params, config, key=jax.random.key(0))
    about = {"scale": config.scale, "scale_sparse": True}
    (tmp_path / "adapter").mkdir()
    saved = adapter.Saved(updates.deltas, updates.supports, {}, {}, about, {} if head is None else kept(head))
    adapter.save(tmp_path / "adapter", saved)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: karcher\nmodels: [{model: base+adapter}, {model: model_0}]\n")
    if head == 1:
        assert command.main([str(recipe), str(tmp_path / "out")]) == 0
        assert hf.load_pretrained(tmp_path / "out")[0] == model
    else:
        words = (tmp_path / "adapter", tmp_path / "base", "the heads of layer 0 differ")
        refused(tmp_path, recipe, capsys, *words)
