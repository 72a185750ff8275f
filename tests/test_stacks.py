"""Layers stacked and apart: one model, one set of files, whichever way it runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import decoders
import dsee_jax
import runs
import tiny
from dsee_jax import models, stacks, tree
from dsee_jax.ckpt import adapter, hf, hf_save
from dsee_jax.deltas import attach, create, fold
from dsee_jax.errors import InputError
from dsee_jax.generation import decoding
from dsee_jax.runtime import multihost
from dsee_jax.train import loop

FAMILIES = ("llama", "gpt2")
BOTH = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def made(family, layers=3, **changes):
    """A model, its params, and updates that are not 0."""
    depth = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[family]
    fields = decoders.config(**(decoders.VARIANTS[family] | {depth: layers} | changes))
    model = models.find(family).Model(models.find(family).Config.from_hf(fields))
    params = tiny.params(model, jnp.zeros((1, 1), jnp.int32))
    config = dsee_jax.DeltaConfig(targets=(".*/(query|up)/kernel",), rank=2, nonzeros=3, support="random")
    deltas, supports = create.init(params, config, key=jax.random.key(0))
    return model, params, jax.tree.map(lambda leaf: leaf + 0.1, deltas), supports, config


def same(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def ids(length=7):
    return tiny.batch(rows=2, length=length, padded=False)["input_ids"]


def test_paths():
    assert stacks.place("decoder/layer_10/mlp/up/kernel") == ("decoder/layers/mlp/up/kernel", 10)
    assert stacks.place("layer_0/bias") == ("layers/bias", 0)
    assert stacks.place("embeddings/word/embedding") == ("embeddings/word/embedding", None)
    assert stacks.paths("decoder/layers/mlp/up/kernel", 2) == [
        "decoder/layer_0/mlp/up/kernel",
        "decoder/layer_1/mlp/up/kernel",
    ]
    assert stacks.paths("layers/bias", 1) == ["layer_0/bias"]
    assert stacks.paths("norm/scale", 5) == ["norm/scale"]


@BOTH
def test_stacked_and_apart(family):
    """In the order of the layers' numbers (layer_10 sorts before layer_2), NumPy or not; as the model that scans asks."""
    model, params, deltas, supports, _ = made(family, layers=12)
    for values in (params, deltas, supports, multihost.to_host(params)):
        same(stacks.unstack(stacks.stack(values)), values)
    path = "decoder/layers/mlp/up/kernel"
    whole = tree.get(stacks.stack(params), path)
    np.testing.assert_array_equal(whole[10], tree.get(params, "decoder/layer_10/mlp/up/kernel"))
    asked = tree.flatten(models.shapes(model.clone(scan=True)))
    assert {path: leaf.shape for path, leaf in asked.items()} == {
        path: leaf.shape for path, leaf in tree.flatten(stacks.stack(params)).items()
    }


def test_layers_that_differ():
    with pytest.raises(InputError, match=r"layer 1 has no 'layer_1/bias', which another has"):
        stacks.stack({"layer_0": {"bias": np.zeros(1)}, "layer_1": {"scale": np.zeros(1)}})
    with pytest.raises(InputError, match=r"'layers/bias' has the shapes \(1,\), \(2,\) in its layers"):
        stacks.stack({"layer_0": {"bias": np.zeros(1)}, "layer_1": {"bias": np.zeros(2)}})
    model, params, *_ = made("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"layers that differ \(scale_attn_by_inverse_layer_idx\) cannot be scanned"):
        model.clone(scan=True).apply({"params": stacks.stack(params)}, ids())


@pytest.mark.parametrize(
    ("remat", "family"),
    [
        (False, "llama"),
        (True, "gpt2"),
        pytest.param(True, "llama", marks=pytest.mark.slow),
        pytest.param(False, "gpt2", marks=pytest.mark.slow),
    ],
)
def test_one_function(family, remat):
    """Logits, and gradients of every update, with the updates attached and folded."""
    model, params, deltas, supports, _ = made(family)

    def logits(model, params, supports, deltas):
        return attach.apply(model, params, deltas, supports, {"input_ids": ids()})

    def loss(*args):
        return jnp.sum(jnp.tanh(logits(*args)))

    scanned = functools.partial(
        logits, model.clone(scan=True, remat=remat), stacks.stack(params), stacks.stack(supports)
    )
    expected = jax.jit(functools.partial(logits, model, params, supports))(deltas)
    np.testing.assert_allclose(jax.jit(scanned)(stacks.stack(deltas)), expected, atol=2e-5 * np.abs(expected).max())
    folded = fold.materialize(stacks.stack(params), stacks.stack(deltas), stacks.stack(supports))
    same(stacks.unstack(folded), fold.materialize(params, deltas, supports))
    gradient = jax.jit(jax.grad(functools.partial(loss, model, params, supports)))(deltas)
    found = jax.jit(jax.grad(lambda deltas: jnp.sum(jnp.tanh(scanned(deltas)))))(stacks.stack(deltas))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for path, leaf in tree.flatten(stacks.unstack(found)).items():
        np.testing.assert_allclose(leaf, tree.get(gradient, path), atol=1e-5 * largest, err_msg=path)


def test_what_is_kept_for_the_backward_pass():
    """Remat keeps what goes from layer to layer; a program that scans does not grow with the depth."""
    model, params, deltas, supports, _ = made("llama", layers=12)

    def compiled(model, params, supports, deltas):
        run = lambda deltas: jnp.sum(attach.apply(model, params, deltas, supports, {"input_ids": ids(32)}) ** 2)
        return jax.jit(jax.grad(run)).lower(deltas).compile()

    stacked = [stacks.stack(values) for values in (params, supports, deltas)]
    plain = compiled(model, params, supports, deltas)
    scan, remat = (compiled(model.clone(scan=True, remat=remat), *stacked) for remat in (False, True))
    assert len(scan.as_text()) < len(plain.as_text()) / 3
    kept = [each.memory_analysis().temp_size_in_bytes for each in (scan, remat)]
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.exhaustive)])
def test_updates_begin_alike(family):
    """The same random numbers and coordinates, layer for layer, by every selector."""
    _, params, _, _, config = made(family, layers=12)
    for support in ("random", "magnitude", "grebsmo"):
        asked = dsee_jax.DeltaConfig(targets=config.targets, rank=2, nonzeros=3, support=support)
        apart, stacked = (create.init(p, asked, key=jax.random.key(1)) for p in (params, stacks.stack(params)))
        for found, expected in zip(stacked, apart, strict=True):
            same(stacks.unstack(found), expected)


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_the_same(family, beams):
    model, params, *_ = made(family)
    write = functools.partial(decoding.generate, new_tokens=5, beams=beams)
    expected = write(model, params, ids())
    np.testing.assert_array_equal(write(model.clone(scan=True), stacks.stack(params), ids()), expected)


@BOTH
def test_files_are_the_same(tmp_path, family):
    """Read stacked from shards smaller than a stack, and written again byte for byte."""
    model, params, *_ = made(family)
    hf_save.save_pretrained(tmp_path / "apart", model, params, max_shard_size=20_000)
    read, stacked = hf.load_pretrained(tmp_path / "apart", "causal-lm", scan=True, remat=True)
    assert (read.scan, read.remat) == (True, True)
    same(stacked, stacks.stack(params))
    hf_save.save_pretrained(tmp_path / "again", read, stacked, max_shard_size=20_000, source=tmp_path / "apart")
    written = {path.name: path.read_bytes() for path in (tmp_path / "apart").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_read_in_another_type(tmp_path):
    """bfloat16, rounded from what the file holds; what is written again says so and reads back bit for bit."""
    model, params, *_ = made("llama")
    hf_save.save_pretrained(tmp_path / "wide", model, params)
    read, narrow = hf.load_pretrained(tmp_path / "wide", "causal-lm", param_dtype="bfloat16")
    same(narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    hf_save.save_pretrained(tmp_path / "narrow", read, narrow)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    same(hf.load_pretrained(tmp_path / "narrow", "causal-lm", param_dtype="bfloat16")[1], narrow)
    with pytest.raises(InputError, match="param_dtype is 'float16'; use float32 or bfloat16"):
        hf.load_pretrained(tmp_path / "wide", "causal-lm", param_dtype="float16")


def test_read_to_where_it_belongs(tmp_path):
    """Every param comes with the sharding that was asked for it, stacked ones under their own paths."""
    model, params, *_ = made("llama")
    hf_save.save_pretrained(tmp_path / "base", model, params)
    mesh, seen = Mesh(np.array(jax.devices()[:1]), ("all",)), []

    def sharding(asked):
        seen.append(asked)
        axes = {path: leaf.ndim for path, leaf in tree.flatten(models.shapes(asked)).items()}
        return lambda path: NamedSharding(mesh, PartitionSpec(*[None] * (axes[path] - 1), "all"))

    read, stacked = hf.load_pretrained(tmp_path / "base", "causal-lm", scan=True, sharding=sharding)
    assert seen == [read]
    same(stacked, stacks.stack(params))
    assert all(leaf.sharding == sharding(read)(path) for path, leaf in tree.flatten(stacked).items())


def test_encoders_are_not_scanned(tmp_path):
    tiny.bert(tmp_path / "bert")
    with pytest.raises(InputError, match="layers of 'bert' cannot be scanned, those of decoders can: scan=False"):
        hf.load_pretrained(tmp_path / "bert", scan=True)
    with pytest.raises(InputError, match="layers of 'bert' cannot be computed again, .*: remat=False"):
        hf.load_pretrained(tmp_path / "bert", remat=True)


@pytest.mark.parametrize(
    ("scope", "score"),
    [
        pytest.param("global", "WABS", marks=pytest.mark.slow),
        pytest.param("tensor", "WANDA", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_is_the_same(tmp_path, scope, score):
    """Tuned, pruned and tuned again; every figure up to rounding, the same weights zero, files for either."""
    pytest.importorskip("sacrebleu", reason="needs sacrebleu (extra `text`)")
    decoders.write(tmp_path / "base", tie_word_embeddings=True, eos_token_id=9, **decoders.VARIANTS["llama"])
    pruned = {"prune__sparsity": 0.5, "prune__scope": scope, "prune__score": score}
    common = runs.writing(tmp_path, **pruned, train__epochs=0.6, train__retune_epochs=0.6)
    found = []
    for name, own in (("apart", {}), ("scanned", {"model__scan": True, "model__remat": True})):
        config = runs.config(tmp_path, **common, **own, output_dir=str(tmp_path / name))
        found.append(loop.run(config, say=lambda text: None))
    apart, scanned = found
    for name in ("weight_sparsity", "flops_per_token", "flops_per_example", "trainable_parameters", "model_bytes"):
        assert scanned[name] == apart[name], name
    for before, after in zip(apart["stages"], scanned["stages"], strict=True):
        assert after["metrics"] == pytest.approx(before["metrics"], rel=1e-3)
    masks = [adapter.load(tmp_path / name / "adapter").masks for name in ("apart", "scanned")]
    moved = [np.mean(a != b) for a, b in zip(*(tree.flatten(mask).values() for mask in masks), strict=True)]
    assert max(moved) < 0.01
    assert tree.flatten(masks[0]).keys() == tree.flatten(masks[1]).keys()


def test_cuts_need_layers_apart(tmp_path):
    with pytest.raises(InputError, match="model.scan is True; expected false: structured leaves layers that differ"):
        runs.config(tmp_path, model__scan=True, prune__kind="structured", prune__heads=1)
