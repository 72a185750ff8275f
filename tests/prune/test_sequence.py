"""Layer by layer: each layer's inputs are those behind the pruned layers, of the layers before alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import masks, prune, stacks, tree
from dsee_jax.ckpt import hf
from dsee_jax.errors import InputError
from dsee_jax.prune import calibration
from dsee_jax.train.losses import cross_entropy
from examples import case

TARGETS = ["encoder/.*/kernel"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model of two layers with updates, and two batches."""
    model, params, batch = case(tmp_path_factory.mktemp("layers") / "hf", layers=2)
    config = dsee_jax.DeltaConfig(targets=[".*/query/kernel"], rank=2, nonzeros=3, support="magnitude")
    adapter = dsee_jax.deltas.init(params, config, key=jax.random.key(0))
    adapter = adapter.replace(deltas=jax.tree.map(lambda leaf: leaf + 0.3, adapter.deltas))
    return model, params, adapter, [batch, batch]


def layer(flat, number):
    return {path: value for path, value in tree.flatten(flat).items() if f"layer_{number}/" in path}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


@pytest.mark.parametrize("score", ["WANDA", pytest.param("SPARSEGPT", marks=pytest.mark.slow)])
def test_each_layer_is_measured_behind_the_pruned_ones(tuned, score):
    """By hand: the first layer on the model as it is, the second on the model with the first layer pruned."""
    model, params, adapter, batches = tuned
    kept, new = prune.layerwise(*tuned[:3], TARGETS, batches, score=score)
    current, drawn = params, {}
    for number in range(2):
        folded, rules = dsee_jax.materialize(current, adapter), [f"encoder/layer_{number}/.*/kernel"]
        if score == "SPARSEGPT":
            grams = calibration.grams(model, folded, batches)
            own, current = prune.sparsegpt(current, adapter, rules, grams=grams)
        else:
            inputs = calibration.sizes(model, folded, batches)
            own = prune.unstructured(current, adapter, rules, score=score, scope="tensor", inputs=inputs)
            current = masks.apply(current, own)
        drawn |= tree.flatten(own)
    assert_equal(tree.flatten(kept), drawn)
    for path, value in tree.flatten(current).items():
        np.testing.assert_allclose(tree.get(new, path), value, atol=1e-4, err_msg=path)
    at_once, _ = prune.layerwise(*tuned[:3], TARGETS, batches, score=score, behind=False)
    assert_equal(layer(kept, 0), layer(at_once, 0))
    assert any((layer(kept, 1)[path] != mask).any() for path, mask in layer(at_once, 1).items())


def test_groups_are_the_layers_in_the_order_of_application(tuned):
    model, params, _, batches = tuned
    kernels = [path for path in tree.flatten(params) if path.endswith("/kernel")]
    order = calibration.groups(model, params, batches[0], kernels)
    assert [{path.split("/")[1] for path in group} for group in order[:2]] == [{"layer_0"}, {"layer_1"}]
    assert order[2:] == (("pooler/kernel",), ("classifier/kernel",))
    assert sorted(path for group in order for path in group) == kernels
    every = calibration.sizes(model, params, batches)
    for number, group in enumerate(order):
        for path, size in calibration.sizes_of(model, params, batches, order, number).items():
            assert path in group
            np.testing.assert_allclose(size, every[path], rtol=1e-5)


@pytest.mark.slow
def test_masks_only_shrink_and_nm_keeps_its_groups(tuned):
    first, _ = prune.layerwise(*tuned[:3], TARGETS, tuned[3], sparsity=0.2)
    second, _ = prune.layerwise(*tuned[:3], TARGETS, tuned[3], sparsity=0.5, keep=first, score="RIA", scope="output")
    for path, mask in tree.flatten(second).items():
        assert not (mask & ~tree.get(first, path)).any()
        assert mask.mean() == pytest.approx(0.5)
    groups, _ = prune.layerwise(*tuned[:3], TARGETS, tuned[3], n=1, m=4)
    for mask in tree.flatten(groups).values():
        assert (mask.reshape(-1, 4, mask.shape[1]).sum(1) == 1).all()


@pytest.mark.slow
def test_scanned_layers_equal_separate_layers(tmp_path):
    decoders.write(tmp_path / "hf", **decoders.VARIANTS["llama"])
    batch = tiny.batch(rows=3, length=8) | {"weights": np.ones((3, 8), np.float32)}
    batch |= {"labels": np.roll(batch["input_ids"], -1, axis=1)}
    model, params = hf.load_pretrained(tmp_path / "hf", "causal-lm")
    scanned = model.clone(scan=True, remat=True), stacks.stack(params)
    for score, scope in (("WANDA", "tensor"), ("SPARSEGPT", "tensor"), ("SPARSEGPT", "global")):
        options = {"score": score, "scope": scope, "losses": cross_entropy}
        separate = prune.layerwise(model, params, None, ["decoder/.*/kernel"], [batch], **options)
        together = prune.layerwise(*scanned, None, ["decoder/.*/kernel"], [batch], **options)
        for one, other in zip(separate, together, strict=True):
            assert_equal(tree.flatten(stacks.stack(one)), tree.flatten(other))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"score": "TAYLOR"}, "score is 'TAYLOR'.*: use one of WANDA, RIA, SPARSEGPT"),
        ({"scope": "global"}, "scope is 'global'; expected tensor or output: a layer is pruned before"),
        (
            {"score": "SPARSEGPT", "scope": "output"},
            "scope is 'output'; expected tensor or global: SPARSEGPT prunes bl",
        ),
        ({"batches": []}, "there are no batches"),
        ({"batches": [{"input_ids": np.ones((1, 4), np.int32)}]}, "batch 0 has input_ids and no 'weights'"),
        ({"targets": ["encoder/.*/norm/scale"]}, "matches nothing"),
        ({"targets": [".*/word/embedding"]}, "no nn.Dense applies 'embeddings/word/embedding'"),
    ],
)
def test_bad_input_names_the_argument(tuned, options, line):
    given = {"targets": TARGETS, "batches": tuned[3]} | options
    with pytest.raises(InputError, match=line):
        prune.layerwise(*tuned[:3], given.pop("targets"), given.pop("batches"), **given)


def test_examples_without_weight_are_an_error(tuned):
    model, params, _, (batch, _) = tuned
    for batches, line in (([], "there are no batches"), ([batch | {"weights": jnp.zeros(4)}], "hold no example")):
        with pytest.raises(InputError, match=line):
            calibration.sizes(model, params, batches)
