"""Masked models: a Linen model of full shape computes the logits of the smaller model, with updates on every kernel."""

import jax
import numpy as np
import pytest

import dsee_jax
import tiny
from cut_models import close, families, logits, whole
from dsee_jax import models, prune, tree
from dsee_jax.errors import InputError
from dsee_jax.prune import compaction

LAYERS, WIDTH = 3, 24

DEPTH = {
    "layers": np.array([False, True, False]),
    "heads": {"layer_1": np.array([True, False, True])},
    "neurons": {"layer_1": np.arange(40) % 3 > 0},
}
"""The first and the last layer go; the last layer of an encoder computes the first position only, for a classifier."""

HIDDEN = {"hidden": np.arange(WIDTH) % 3 > 0}


def same(family, kept, *, updated=True):
    """Assert that the masked and the compacted model agree."""
    model, params, adapter = whole(family, LAYERS)
    small, small_params = dsee_jax.compact(model, params, kept)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(small_params).items()}
    assert shapes == {path: leaf.shape for path, leaf in tree.flatten(models.shapes(small)).items()}
    table = compaction.indices(model, kept, adapter.deltas, adapter.supports)
    deltas = compaction.cut_tree({"deltas": adapter.deltas}, table)["deltas"]
    cut = adapter.replace(deltas=deltas, supports=compaction.cut_supports(adapter.supports, table))
    with prune.masked(model, kept):
        masked = logits(model, params, adapter if updated else None)
    if model.task == "features" and "hidden" in kept:
        masked = masked[..., kept["hidden"]]
    close(logits(small, small_params, cut if updated else None), masked)


@pytest.mark.sampled(2)
@families("bert", "gpt2", "qwen3")
def test_model_without_layers_and_width_equals_masked_model(family):
    same(family, DEPTH | HIDDEN)


@pytest.mark.slow
def test_compiled_functions_are_traced_again_in_the_block():
    """Generation is compiled by the model and its options; the cache of a dropped layer stays as it is."""
    model, params, _ = whole("llama", LAYERS)
    kept = {"layers": DEPTH["layers"]} | HIDDEN
    ids = np.random.default_rng(0).integers(5, 30, (2, 4)).astype(np.int32)
    write = lambda model, params: np.asarray(dsee_jax.generate(model, params, ids, np.ones_like(ids), new_tokens=4))
    before = write(model, params)
    with prune.masked(model, kept):
        masked = write(model, params)
    np.testing.assert_array_equal(masked, write(*dsee_jax.compact(model, params, kept)))
    assert (masked != before).any()
    np.testing.assert_array_equal(write(model, params), before)


UNITS = {
    "no head": {"heads": {"layer_0": np.zeros(3, bool)}},
    "a layer less": {"layers": np.array([True, False, True])},
    "less width": HIDDEN,
}


def test_compiled_function_runs_in_several_blocks():
    """Each block traces it, also with the same kept units again."""
    model, params, _ = whole("bert", LAYERS)
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch))
    for _ in range(2):
        with prune.masked(model, UNITS["no head"]):
            run.eval_shape(params, tiny.batch())


@pytest.mark.parametrize("kept", UNITS.values(), ids=UNITS)
def test_block_without_a_call_is_refused(kept):
    model, *_ = whole("bert", LAYERS)
    message = "reached no nn.Dense|ran no layer_0, layer_1, layer_2: call the model"
    with pytest.raises(InputError, match=message), prune.masked(model, kept):
        pass


@pytest.mark.exhaustive
@families()
@pytest.mark.parametrize("kept", [DEPTH, {"layers": DEPTH["layers"]}, HIDDEN], ids=["depth", "layers alone", "width"])
@pytest.mark.parametrize("updated", [True, False])
def test_each_kind_of_cut_equals_the_masked_model(family, kept, updated):
    same(family, kept, updated=updated)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers": np.ones(2, bool)}, "the model has 3 layers and the kept units are of 2: they belong to another"),
        ({"layers": np.zeros(3, bool)}, "no layers of the model are kept: keep one or more of the 3"),
        ({"hidden": np.ones(25, bool)}, "the model has 24 hidden dimensions and the kept units are of 25"),
        ({"hidden": np.zeros(24, bool)}, "no hidden dimensions of the model are kept"),
        (
            {"heads": {"layer_7": np.ones(3, bool)}},
            "kept heads are of 'layer_7' and the model has the layers layer_0 to layer_2",
        ),
        ({"heads": np.ones(3, bool)}, "the kept heads are of the type ndarray; expected a mapping of layers to flags"),
        ({"neurons": {"layer_0": np.bool_(True)}}, "layer 0 has 40 neurons and the kept units are of 1"),
    ],
)
def test_kept_units_that_do_not_fit_are_refused(kept, message):
    model, params, _ = whole("bert", LAYERS)
    with pytest.raises(InputError, match=message), prune.masked(model, kept):
        pass
    with pytest.raises(InputError, match=message):
        dsee_jax.compact(model, params, kept)


def test_masks_of_params_are_no_kept_units():
    model, *_ = whole("bert", LAYERS)
    masks = {"encoder": {"layer_0": {"mlp": {"up": {"kernel": np.ones((24, 40), bool)}}}}}
    message = "the kept units have the key 'encoder'; expected heads, neurons, layers, hidden"
    with pytest.raises(InputError, match=message), prune.masked(model, masks):
        pass
    with pytest.raises(InputError, match="'layer' .did you mean 'layers'"), prune.masked(model, {"layer": {}}):
        pass
