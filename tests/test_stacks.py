"""Stacked layers: equal models, runs and files with and without scan."""

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
    """Return a model, its params, an adapter of nonzero updates, and the config of the updates."""
    depth = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[family]
    fields = decoders.config(**(decoders.VARIANTS[family] | {depth: layers} | changes))
    model = models.find(family).model(models.find(family).config.from_hf(fields))
    params = tiny.params(model, np.zeros((1, 1), np.int32))
    config = dsee_jax.DeltaConfig(targets=(".*/(query|up)/kernel",), rank=2, alpha=4.0, nonzeros=3, support="random")
    return model, params, tiny.adapter(params, config, spread=0.2), config


def stacked(updates):
    """Return the adapter of the model with scanned layers."""
    updates = jax.tree.map(np.asarray, updates)
    return updates.replace(deltas=stacks.stack(updates.deltas), supports=stacks.stack(updates.supports))


def same(actual, expected):
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def ids(length=7):
    return tiny.batch(rows=2, length=length, padded=False)["input_ids"]


def test_paths_of_stacks():
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
def test_unstack_inverts_stack(family):
    """In numeric order of the layers (as text, layer_10 precedes layer_2), for NumPy and JAX arrays, in the scanned shapes."""
    model, params, updates, _ = made(family, layers=12)
    for values in (params, updates.deltas, updates.supports, multihost.to_host(params)):
        same(stacks.unstack(stacks.stack(values)), values)
    path = "decoder/layers/mlp/up/kernel"
    kernels = tree.get(stacks.stack(params), path)
    np.testing.assert_array_equal(kernels[10], tree.get(params, "decoder/layer_10/mlp/up/kernel"))
    shapes = tree.flatten(models.shapes(model.clone(scan=True)))
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        path: leaf.shape for path, leaf in tree.flatten(stacks.stack(params)).items()
    }


def test_layers_that_differ_are_refused():
    with pytest.raises(InputError, match=r"layer 1 has no 'layer_1/bias', which another layer has"):
        stacks.stack({"layer_0": {"bias": np.zeros(1)}, "layer_1": {"scale": np.zeros(1)}})
    with pytest.raises(InputError, match=r"'layers/bias' has the shapes \(1,\), \(2,\) in its layers"):
        stacks.stack({"layer_0": {"bias": np.zeros(1)}, "layer_1": {"bias": np.zeros(2)}})
    model, params, *_ = made("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"layers that differ \(scale_attn_by_inverse_layer_idx\) cannot be scanned"):
        model.clone(scan=True).apply({"params": stacks.stack(params)}, ids())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("remat", "family"),
    [
        (False, "llama"),
        (True, "gpt2"),
        pytest.param(True, "llama", marks=pytest.mark.slow),
        pytest.param(False, "gpt2", marks=pytest.mark.slow),
    ],
)
def test_scanned_model_equals_layered_model(family, remat):
    """Logits, and the gradients of every update, with attached and folded updates."""
    model, params, updates, _ = made(family)

    def run(model, params, updates):
        """Return the gradient of a loss, and the logits."""

        def loss(deltas):
            logits = attach.apply(model, params, updates.replace(deltas=deltas), {"input_ids": ids()})
            return jnp.sum(jnp.tanh(logits)), logits

        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(updates.deltas))

    gradient, expected = run(model, params, updates)
    actual, logits = run(model.clone(scan=True, remat=remat), stacks.stack(params), stacked(updates))
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    folded = fold.materialize(stacks.stack(params), stacked(updates))
    same(stacks.unstack(folded), fold.materialize(params, updates))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for path, leaf in tree.flatten(stacks.unstack(actual)).items():
        np.testing.assert_allclose(leaf, tree.get(gradient, path), atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
def test_scan_and_remat_save_code_and_memory():
    """Remat keeps only the outputs of layers; the size of a scanned program does not depend on the depth."""
    model, params, updates, _ = made("llama", layers=12)

    def compiled(model, params, updates):
        logits = lambda deltas: attach.apply(model, params, updates.replace(deltas=deltas), {"input_ids": ids(32)})
        return jax.jit(jax.grad(lambda deltas: jnp.sum(logits(deltas) ** 2))).lower(updates.deltas).compile()

    plain = compiled(model, params, updates)
    whole = stacks.stack(params), stacked(updates)
    scan, remat = (compiled(model.clone(scan=True, remat=remat), *whole) for remat in (False, True))
    assert len(scan.as_text()) < len(plain.as_text()) / 3
    temporaries = [each.memory_analysis().temp_size_in_bytes for each in (scan, remat)]
    assert temporaries[1] < temporaries[0] / 2


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.exhaustive)])
def test_initial_updates_are_equal(family):
    """Every selector gives equal random numbers and coordinates per layer."""
    _, params, _, config = made(family, layers=12)
    for support in ("random", "magnitude", "grebsmo"):
        delta = dsee_jax.DeltaConfig(targets=config.targets, rank=2, nonzeros=3, support=support)
        layered, whole = (create.init(p, delta, key=jax.random.key(1)) for p in (params, stacks.stack(params)))
        same(stacks.unstack(whole.deltas), layered.deltas)
        same(stacks.unstack(whole.supports), layered.supports)


@pytest.mark.sampled(2)
@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_equal(family, beams):
    model, params, *_ = made(family)
    write = functools.partial(decoding.generate, new_tokens=5, beams=beams)
    expected = write(model, params, ids())
    np.testing.assert_array_equal(write(model.clone(scan=True), stacks.stack(params), ids()), expected)


@BOTH
def test_files_are_equal(tmp_path, family):
    """Stacked params are read from shards smaller than a stack, and are written again byte for byte."""
    model, params, *_ = made(family)
    hf_save.save_pretrained(tmp_path / "layered", model, params, max_shard_size=20_000)
    read, whole = hf.load_pretrained(tmp_path / "layered", "causal-lm", scan=True, remat=True)
    assert (read.scan, read.remat) == (True, True)
    same(whole, stacks.stack(params))
    hf_save.save_pretrained(tmp_path / "again", read, whole, max_shard_size=20_000, source=tmp_path / "layered")
    written = {path.name: path.read_bytes() for path in (tmp_path / "layered").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_params_are_read_in_another_dtype(tmp_path):
    """bfloat16 params are rounded from the file, written with this dtype, and read back bit for bit."""
    model, params, *_ = made("llama")
    hf_save.save_pretrained(tmp_path / "wide", model, params)
    read, narrow = hf.load_pretrained(tmp_path / "wide", "causal-lm", param_dtype="bfloat16")
    same(narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    hf_save.save_pretrained(tmp_path / "narrow", read, narrow)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    same(hf.load_pretrained(tmp_path / "narrow", "causal-lm", param_dtype="bfloat16")[1], narrow)
    with pytest.raises(InputError, match="param_dtype is 'float16'; use float32 or bfloat16"):
        hf.load_pretrained(tmp_path / "wide", "causal-lm", param_dtype="float16")


def test_params_have_their_shardings(tmp_path):
    """Every param has the requested sharding, stacked params by their own paths."""
    model, params, *_ = made("llama")
    hf_save.save_pretrained(tmp_path / "base", model, params)
    mesh, seen = Mesh(np.array(jax.devices()[:1]), ("all",)), []

    def sharding(model):
        seen.append(model)
        axes = {path: leaf.ndim for path, leaf in tree.flatten(models.shapes(model)).items()}
        return lambda path: NamedSharding(mesh, PartitionSpec(*[None] * (axes[path] - 1), "all"))

    read, whole = hf.load_pretrained(tmp_path / "base", "causal-lm", scan=True, sharding=sharding)
    assert seen == [read]
    same(whole, stacks.stack(params))
    assert all(leaf.sharding == sharding(read)(path) for path, leaf in tree.flatten(whole).items())


def test_encoders_are_not_scanned(tmp_path):
    tiny.bert(tmp_path / "bert")
    with pytest.raises(InputError, match="layers of 'bert' cannot be scanned, only those of decoders: use scan=False"):
        hf.load_pretrained(tmp_path / "bert", scan=True)
    with pytest.raises(InputError, match="layers of 'bert' cannot be recomputed, .*: use remat=False"):
        hf.load_pretrained(tmp_path / "bert", remat=True)


@pytest.mark.parametrize(
    ("scope", "score"),
    [
        pytest.param("global", "WABS", marks=pytest.mark.slow),
        pytest.param("tensor", "WANDA", marks=pytest.mark.exhaustive),
    ],
)
def test_scanned_run_equals_layered_run(tmp_path, scope, score):
    """Tune, prune and retune: equal figures up to rounding, equal zeros, equal names in files."""
    pytest.importorskip("sacrebleu", reason="needs sacrebleu (extra `text`)")
    decoders.write(tmp_path / "base", tie_word_embeddings=True, eos_token_id=9, **decoders.VARIANTS["llama"])
    pruned = {"prune__sparsity": 0.5, "prune__scope": scope, "prune__score": score}
    common = runs.causal_lm(tmp_path, **pruned, train__epochs=0.6, train__retune_epochs=0.6)
    results = []
    for name, own in (("layered", {}), ("scanned", {"model__scan": True, "model__remat": True})):
        config = runs.config(tmp_path, **common, **own, output_dir=str(tmp_path / name))
        results.append(loop.run(config, say=lambda text: None))
    layered, scanned = results
    for name in ("weight_sparsity", "flops_per_token", "flops_per_example", "trainable_parameters", "model_bytes"):
        assert scanned[name] == layered[name], name
    for before, after in zip(layered["stages"], scanned["stages"], strict=True):
        assert after["metrics"] == pytest.approx(before["metrics"], rel=1e-3)
    masks = [adapter.load(tmp_path / name / "adapter").masks for name in ("layered", "scanned")]
    moved = [np.mean(a != b) for a, b in zip(*(tree.flatten(mask).values() for mask in masks), strict=True)]
    assert max(moved) < 0.01
    assert tree.flatten(masks[0]).keys() == tree.flatten(masks[1]).keys()


def test_structured_pruning_refuses_scan(tmp_path):
    with pytest.raises(
        InputError, match="model.scan is True; expected false: structured cuts the arrays layer by layer"
    ):
        runs.config(tmp_path, model__scan=True, prune__kind="structured", prune__heads=1)
