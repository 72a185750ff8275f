"""Models with heads and neurons cut out: siblings of one cut merge, others are refused before anything is written."""

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
from dsee_jax.ckpt import adapter, hf, hf_save, kept_units
from dsee_jax.prune import compaction, units
from merge import __main__ as command


@functools.cache
def kept(head):
    """All heads but one, and all neurons of the last layer gone; a cut of equal widths for every ``head``."""
    flags = {f"layer_{layer}": np.arange(3) != head for layer in range(2)}
    return {"heads": flags, "neurons": {"layer_1": np.zeros(40, bool)}}


def family(folder, *heads):
    """Write ``dense``, ``base`` and ``model_0`` ..., cut without these heads, and return the base's cut."""
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
    return np.asarray(dsee_jax.apply(model, params, None, None, tiny.batch()))


@pytest.mark.parametrize("method", ["linear", "rankmean", "task_arithmetic"])
def test_siblings_of_one_cut(tmp_path, method):
    """Streamed from files to files: a compact checkpoint again, that loads here and expands to full shape."""
    cut = family(tmp_path, 1, 1)
    recipe = checkpoints.recipe(tmp_path, method, each={} if method == "rankmean" else {"weight": 1})
    assert command.main([str(recipe), str(tmp_path / "out")]) == 0
    assert kept_units.difference(kept_units.read(tmp_path / "out"), cut) is None
    small, params = hf.load_pretrained(tmp_path / "out")
    assert (small.config.kept_heads, small.config.kept_neurons) == ((2, 2), (40, 0))
    if method == "linear":
        a, b = (hf.load_pretrained(tmp_path / f"model_{number}")[1] for number in range(2))
        jax.tree.map(lambda x, a, b: np.testing.assert_allclose(x, (a + b) / 2, atol=1e-6), params, a, b)
    whole, dense = compaction.expand(small, params, kept_units.read(tmp_path / "out"))
    hf_save.save_pretrained(tmp_path / "full", whole, dense, source=tmp_path / "out")
    assert "kept_heads" not in json.loads((tmp_path / "full" / "config.json").read_text())
    found = logits(*hf.load_pretrained(tmp_path / "full"))
    np.testing.assert_allclose(found, logits(small, params), atol=1e-5)
    assert "kept.safetensors" in (tmp_path / "out" / "merge_recipe.yml").read_text()


def refused(folder, recipe, capsys, *words):
    before = set(folder.rglob("*"))
    for plan in ([], ["--plan"]):
        assert command.main([str(recipe), str(folder / "out"), *plan]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        for word in words:
            assert str(word) in said.err
    assert set(folder.rglob("*")) == before


def test_another_cut_of_equal_shapes(tmp_path, capsys):
    family(tmp_path, 1, 2)
    recipe = checkpoints.recipe(tmp_path, "linear", each={"weight": 1})
    refused(tmp_path, recipe, capsys, tmp_path / "model_0", tmp_path / "model_1", "the heads of layer 0 differ")


def test_a_dense_base_of_compact_models(tmp_path, capsys):
    family(tmp_path, 1, 1)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "dense").rename(tmp_path / "base")
    recipe = checkpoints.recipe(tmp_path, "task_arithmetic", each={"weight": 1})
    words = (tmp_path / "model_0", f"{tmp_path / 'base'} is not pruned: take the compact model", "--format hf")
    refused(tmp_path, recipe, capsys, *words)


def test_a_compact_model_that_lost_its_units(tmp_path, capsys):
    family(tmp_path, 1, 1)
    (tmp_path / "model_1" / kept_units.KEPT).unlink()
    recipe = checkpoints.recipe(tmp_path, "linear", each={"weight": 1})
    refused(tmp_path, recipe, capsys, tmp_path / "model_1" / "kept.safetensors is missing")


def test_slices_of_cut_models(tmp_path, capsys):
    family(tmp_path, 1, 1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices: [{sources: [{model: model_0, layer_range: [0, 2]}]}, "
        "{sources: [{model: model_1, layer_range: [0, 1]}]}]\n"
    )
    refused(tmp_path, recipe, capsys, "is structurally pruned, layer by layer")


@pytest.mark.parametrize("head", [None, 1, 2])
def test_adapters(tmp_path, capsys, head):
    """One that was tuned on the cut is a sibling; one of another cut, or of the dense model, is refused by name."""
    family(tmp_path, 1, 1)
    model, params = hf.load_pretrained(tmp_path / "base")
    path = "encoder/layer_0/mlp/up/kernel"  # of one shape in all of them
    config = dsee_jax.DeltaConfig(targets=(path,), rank=2, nonzeros=0)
    deltas, supports = dsee_jax.deltas.create.init(params, config, key=jax.random.key(0))
    about = {"scale": config.scale, "scale_sparse": True}
    (tmp_path / "adapter").mkdir()
    made = adapter.Adapter(deltas, supports, {}, {}, about, {} if head is None else kept(head))
    adapter.save(tmp_path / "adapter", made)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: karcher\nmodels: [{model: base+adapter}, {model: model_0}]\n")
    if head == 1:
        assert command.main([str(recipe), str(tmp_path / "out")]) == 0
        assert hf.load_pretrained(tmp_path / "out")[0] == model
    else:
        words = (tmp_path / "adapter", tmp_path / "base", "the heads of layer 0 differ")
        refused(tmp_path, recipe, capsys, *words)
