"""Compacted models give the logits of the masked model, with updates, and expand to the original shapes."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import decoders
import dsee_jax
import tiny
from cut_models import FAMILIES, HEADS, LAYERS, NEURONS, close, families, logits, materialised, whole
from dsee_jax import masks, models, tree
from dsee_jax.ckpt import hf, hf_save, kept_units
from dsee_jax.errors import InputError
from dsee_jax.models import bert
from dsee_jax.prune import compaction, units


def flags(heads, neurons):
    """Return a tree of kept units from one list of bools per layer."""
    return {
        kind: {units.layer(number): np.array(keep, bool) for number, keep in enumerate(layers)}
        for kind, layers in (("heads", heads), ("neurons", neurons))
        if layers
    }


def cut(kept, family="bert"):
    """Return the compacted tiny model: ``(model, params, adapter)``."""
    model, params, adapter = whole(family)
    indices = compaction.indices(model, kept, adapter.deltas, adapter.supports)
    small, small_params = dsee_jax.compact(model, params, units.masks(params, models.cuts(model), kept))
    deltas = compaction.cut_tree({"deltas": adapter.deltas}, indices)["deltas"]
    return (
        small,
        small_params,
        adapter.replace(deltas=deltas, supports=compaction.cut_supports(adapter.supports, indices)),
    )


def same(kept, family="bert"):
    """Assert that masked, compacted and expanded models agree, with and without updates."""
    model, params, adapter = whole(family)
    unit_masks = units.masks(params, models.cuts(model), kept)
    small, small_params, small_adapter = cut(kept, family)
    close(logits(small, small_params), logits(model, masks.apply(params, unit_masks)))
    folded = masks.apply(materialised(params, adapter), unit_masks)
    close(logits(small, small_params, small_adapter), logits(model, folded))
    back, dense = compaction.expand(small, materialised(small_params, small_adapter), kept)
    assert back == model
    for path, leaf in tree.flatten(folded).items():
        np.testing.assert_allclose(tree.get(dense, path), leaf, atol=1e-6)
    assert all(leaf.size for leaf in jax.tree.leaves((small_params, small_adapter)))
    assert all(leaf.size for leaf in jax.tree.leaves(models.shapes(small)))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(small_params).items()}
    assert shapes == {path: leaf.shape for path, leaf in tree.flatten(models.shapes(small)).items()}


def some(size):
    """Draw any flags; all False and all True are more frequent than by chance."""
    return st.one_of(
        st.just([False] * size), st.just([True] * size), st.lists(st.booleans(), min_size=size, max_size=size)
    )


@pytest.mark.slow
@hypothesis.given(
    st.lists(some(HEADS), min_size=LAYERS, max_size=LAYERS), st.lists(some(NEURONS), min_size=LAYERS, max_size=LAYERS)
)
@hypothesis.settings(max_examples=5, deadline=None)
def test_compacted_model_equals_masked_model(heads, neurons):
    same(flags(heads, neurons))


@pytest.mark.sampled(2)
@families("bert", "deberta", "gpt2", "qwen3")
def test_model_without_units_equals_masked_model(family):
    same(flags([[False] * HEADS] * LAYERS, [[False] * NEURONS] * LAYERS), family)


@pytest.mark.sampled(2)
@families("bert", "deberta", "gpt2", "llama with biases")
def test_layers_of_different_widths_equal_masked_model(family):
    """Layer 0 loses all heads and half of its neurons, layer 1 one head and all neurons."""
    same(flags([[0, 0, 0], [1, 0, 1]], [[1, 0] * 20, [0] * 40]), family)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_attached_updates_equal_materialised(family):
    model, params, adapter = whole(family)
    folded = materialised(params, adapter)
    kernels = [path for path in tree.flatten(params) if "coder/" in path and path.endswith("/kernel")]
    assert len(tree.flatten(adapter.deltas)) == 3 * len(kernels)
    close(logits(model, params, adapter), logits(model, folded))


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_checkpoint_round_trips_and_expands(family, tmp_path):
    """A layer has no heads; the expanded weights equal the masked weights bit for bit."""
    model, params, *_ = whole(family)
    kept = flags([[0, 0, 0], [1, 0, 1]], [[1, 0] * 20, [1] * 40])
    small, small_params, *_ = cut(kept, family)
    hf_save.save_pretrained(tmp_path / "small", small, small_params, kept=kept)
    again, read = hf.load_pretrained(tmp_path / "small", model.task)
    assert again == small
    jax.tree.map(np.testing.assert_array_equal, read, small_params)
    back, dense = compaction.expand(again, read, kept_units.read(tmp_path / "small"))
    assert back == model
    masked = masks.apply(params, units.masks(params, models.cuts(model), kept))
    for path, leaf in tree.flatten(masked).items():
        np.testing.assert_array_equal(tree.get(dense, path), leaf)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_equally_cut_layers_are_read_from_standard_fields_alone(family, tmp_path):
    """kept.safetensors and the fields kept_* only tell where the model comes from, and lead back to the masked weights."""
    model, params, *_ = whole(family)
    heads = [] if family != "llama" else [[1, 0, 1], [0, 1, 1]]
    kept = flags(heads, [[1, 0] * 20, [0, 1] * 20])
    small, small_params, *_ = cut(kept, family)
    hf_save.save_pretrained(tmp_path, small, small_params, kept=kept)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert {name for name in fields if name.startswith("kept_")} == {f"kept_{kind}" for kind in kept}
    placed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(placed.values()) == {"model.safetensors"}
    back, dense = compaction.expand(*hf.load_pretrained(tmp_path, model.task), kept_units.read(tmp_path))
    assert back.config.widths == model.config.widths
    masked = masks.apply(params, units.masks(params, models.cuts(model), kept))
    for path, leaf in tree.flatten(masked).items():
        np.testing.assert_array_equal(tree.get(dense, path), leaf)
    (tmp_path / "kept.safetensors").unlink()
    plain = {name: value for name, value in fields.items() if not name.startswith("kept_")}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    again, read = hf.load_pretrained(tmp_path, model.task)
    assert again == small
    jax.tree.map(np.testing.assert_array_equal, read, small_params)


def test_config_holds_the_widths():
    model, params, adapter = whole()
    unit_masks = units.structured(params, adapter, models.cuts(model), heads=1, neurons=0.4)
    small, small_params = dsee_jax.compact(model, params, unit_masks)
    widths = small.config.widths
    assert (sum(widths["heads"]), sum(widths["neurons"])) == (2 * 3 - 1, 80 - 32)
    assert small_params["encoder"]["layer_1"]["mlp"]["up"]["kernel"].shape == (24, widths["neurons"][1])
    assert hash(small.config) != hash(model.config)
    nothing, same_params = dsee_jax.compact(model, params, {})
    assert nothing == model
    jax.tree.map(np.testing.assert_array_equal, same_params, params)


def test_two_cuts_in_a_row_equal_one_cut():
    """The second cut is over the units that the first keeps."""
    first = flags([[1, 0, 1], [0, 1, 1]], [[1] * 30 + [0] * 10, [0] * 40])
    second = flags([[0, 1], [1, 1]], [])
    both = compaction.composed(first, second)
    small, params, *_ = cut(first)
    smaller, again = dsee_jax.compact(small, params, units.masks(params, models.cuts(small), second))
    once, expected, *_ = cut(both)
    assert once == smaller
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert both["heads"]["layer_0"].tolist() == [False, False, True]


def test_heads_keep_their_columns_of_a_shared_bias(tmp_path):
    """Also after a second cut; kept units of other heads than the config names are refused."""
    model, params, _ = whole("mpnet")
    first, second = flags([[1, 0, 1], [0, 1, 1]], []), flags([[0, 1], [1, 1]], [])
    small, cut_once = dsee_jax.compact(model, params, units.masks(params, models.cuts(model), first))
    smaller, cut_twice = dsee_jax.compact(small, cut_once, units.masks(cut_once, models.cuts(small), second))
    assert smaller.config.kept_head_numbers == ((2,), (1, 2))
    masked = masks.apply(params, units.masks(params, models.cuts(model), compaction.composed(first, second)))
    close(logits(smaller, cut_twice), logits(model, masked))
    shallow = compaction.resized(small, {"layers": np.array([False, True])})
    assert shallow.config.columns == ((1, 2),)
    other = flags([[1, 1, 0], [0, 1, 1]], [])
    hf_save.save_pretrained(tmp_path, small, cut_once, kept=other)
    with pytest.raises(InputError, match=r"names the heads \(\(0, 2\), .*'kept_head_numbers' and .* give \(\(0, 1\), "):
        hf.load_pretrained(tmp_path, model.task)


def test_cut_after_dropped_layers_is_told_in_the_numbers_before_it():
    """A layer is dropped, then a head, a layer and dimensions of what is left."""
    first = {"layers": np.array([True, False, True, True]), **flags([[1, 0, 1]], [])}
    second = {
        "layers": np.array([False, True, True]),
        "heads": {"layer_2": np.array([True, False, True])},
        "hidden": np.array([True, False]),
    }
    both = compaction.composed(first, second)
    assert both["layers"].tolist() == [False, False, True, True]
    # The layer 0 is gone, with its heads; layer 2 of the smaller model was layer 3.
    assert {name: keep.tolist() for name, keep in both["heads"].items()} == {"layer_3": [True, False, True]}
    assert both["hidden"].tolist() == [True, False]


DEEP = {
    "layers": np.array([True, False, True]),
    "heads": {"layer_2": np.array([True, False, True])},
    "hidden": np.arange(24) % 4 > 0,
}


@families("deberta", "llama")
def test_model_of_fewer_layers_and_less_width_round_trips(family, tmp_path):
    """The expanded model has zeros for heads, fewer layers and less width; its files and its config belong together."""
    model, params, *_ = whole(family, 3)
    small, small_params = dsee_jax.compact(model, params, DEEP)
    assert small.config.hidden_size == 18
    assert small.config.head_size == model.config.head_size
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "pooler_hidden_size": 24}))
    hf_save.save_pretrained(tmp_path / "small", small, small_params, source=tmp_path, kept=DEEP)
    again, read = hf.load_pretrained(tmp_path / "small", model.task)
    assert again == small
    jax.tree.map(np.testing.assert_array_equal, read, small_params)
    wide, dense = compaction.expand(again, read, kept_units.read(tmp_path / "small"))
    assert (wide.config.widths["heads"], wide.config.hidden_size) == ((3, 3), 18)
    once, expected = dsee_jax.compact(wide, dense, {"heads": {"layer_1": DEEP["heads"]["layer_2"]}})
    assert once == small
    jax.tree.map(np.testing.assert_array_equal, expected, small_params)
    with pytest.raises(InputError, match="the model has 2 layers and the kept units give 3"):
        compaction.check(again, {"layers": np.ones(3, bool)})
    with pytest.raises(InputError, match="the model has 18 hidden dimensions and the kept units give 24"):
        compaction.check(again, {"hidden": np.ones(24, bool)})


FEWER = flags([[1, 0, 1], [0, 1, 1]], [[1, 0] * 20, [0, 1] * 20]) | {"hidden": np.arange(24) < 20}


@families("llama")
def test_model_of_equally_fewer_heads_and_less_width_knows_its_kept_units(family):
    """LlamaConfig takes 2 heads and not 3 with a width of 20, so that the model before the cut has no standard fields."""
    model, *_ = whole(family)
    compaction.check(compaction.resized(model, FEWER), FEWER)


@families("bert", "gpt2", "llama")
def test_uneven_model_that_becomes_even_knows_its_kept_neurons(family):
    """The standard field then holds the number after the cut, and the model before it had more neurons in a layer."""
    model, *_ = whole(family)
    uneven = compaction.resized(model, flags([], [[1] * 7 + [0] * 33, [1] * 9 + [0] * 31]))
    even = flags([], [[1] * 5 + [0] * 2, [1] * 5 + [0] * 4])
    compaction.check(compaction.resized(uneven, even), even)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_model_of_equally_fewer_heads_and_less_width_round_trips(family, tmp_path):
    model, params, *_ = whole(family)
    small, small_params = dsee_jax.compact(model, params, FEWER)
    hf_save.save_pretrained(tmp_path, small, small_params, kept=FEWER)
    again, read = hf.load_pretrained(tmp_path, model.task)
    assert again == small
    wide, dense = compaction.expand(again, read, kept_units.read(tmp_path))
    assert (wide.config.widths, wide.config.head_size) == (model.config.widths, model.config.head_size)
    once, expected = dsee_jax.compact(wide, dense, {kind: FEWER[kind] for kind in ("heads", "neurons")})
    assert once == small
    jax.tree.map(np.testing.assert_array_equal, expected, small_params)


def test_windows_follow_their_layers():
    fields = decoders.config(model_type="qwen2", num_hidden_layers=4, max_window_layers=2, **decoders.WINDOW)
    config = models.find("qwen2").config.from_hf(fields)
    assert config.with_layers([True, False, True, False]).windows == (None, 4)
    fields |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config = models.find("qwen2").config.from_hf(fields)
    assert config.with_layers([False, True, True, False]).windows == (None, 4)


def test_layers_that_depend_on_their_number_stay():
    fields = decoders.config(model_type="gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match="'scale_attn_by_inverse_layer_idx' is true: the scores of a layer depend on"):
        models.find("gpt2").config.from_hf(fields).with_layers([True, False])


def test_optimiser_state_is_cut():
    """A step of the compacted model equals the compacted step of the full model."""
    model, params, adapter = whole()
    kept = flags([[1, 0, 1], [0, 0, 0]], [[1] * 7 + [0] * 33, [0] * 40])
    trained = {"deltas": adapter.deltas, "params": params}
    optimizer = optax.adamw(1e-2)
    gradient = jax.tree.map(lambda x: np.cos(7 * x), trained)
    update = jax.jit(optimizer.update)
    _, state = update(gradient, jax.jit(optimizer.init)(trained), trained)
    indices = compaction.indices(model, kept, adapter.deltas, adapter.supports)
    updates, after = update(gradient, state, trained)
    small = [compaction.cut_tree(value, indices) for value in (gradient, state, trained)]
    small_updates, small_after = update(*small)
    jax.tree.map(np.testing.assert_array_equal, small_updates, compaction.cut_tree(updates, indices))
    jax.tree.map(np.testing.assert_array_equal, small_after, compaction.cut_tree(after, indices))
    small_params = small[2]["params"]["encoder"]["layer_1"]
    assert set(small_params["attention"]) == {"output"}
    assert set(small_params["mlp"]["down"]) == {"bias"}
    assert "attention" not in small[2]["deltas"]["encoder"].get("layer_1", {})


def test_supports_are_renumbered():
    *_, adapter = whole()
    kept = flags([[0, 1, 1], [1, 1, 1]], [[0, 1] * 20, [1] * 40])
    *_, small = cut(kept)
    path, untouched = "encoder/layer_0/mlp/down/kernel", "encoder/layer_1/mlp/up/kernel"
    places, values = (tree.get(part, path) for part in (adapter.supports, adapter.deltas))
    left = np.asarray(places)[:, 0] % 2 == 1
    assert 0 < left.sum() < 9
    expected = np.asarray(places)[left] // np.array([[2, 1]])
    np.testing.assert_array_equal(tree.get(small.supports, path), expected)
    np.testing.assert_array_equal(tree.get(small.deltas, f"{path}/values"), values["values"][left])
    np.testing.assert_array_equal(tree.get(small.supports, untouched), tree.get(adapter.supports, untouched))


def test_gradients_through_empty_layers_are_finite():
    small, params, adapter = cut(flags([[0] * 3, [1, 0, 0]], [[0] * 40, [0] * 40]))
    loss = lambda deltas: jnp.sum(dsee_jax.apply(small, params, adapter.replace(deltas=deltas), tiny.batch()) ** 2)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(adapter.deltas)):
        assert np.isfinite(leaf).all()


def test_kept_units_of_another_model_are_refused():
    model, params, *_ = whole()
    with pytest.raises(
        InputError, match="layer 0 has 3 heads and the kept units are of 4: they belong to another model"
    ):
        compaction.indices(model, flags([[1, 1, 0, 1], [1, 1, 1]], []))
    small, small_params, *_ = cut(flags([[1, 0, 1], [1, 1, 1]], []))
    with pytest.raises(InputError, match="the model has the widths .* and the kept units give"):
        compaction.expand(small, small_params, flags([[1, 0, 0], [1, 1, 1]], []))
    unit_masks = units.structured(params, None, models.cuts(model), heads=1, score="W", scope="tensor")
    with pytest.raises(InputError, match="the mask of .*/query/kernel' is for 3 heads; the layer of the model has 2"):
        dsee_jax.compact(small, small_params, unit_masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept_heads": [3]}, "'kept_heads' is .*expected one number for each of the 2 layers"),
        ({"kept_heads": [3, 4]}, "'kept_heads' holds 4; expected whole numbers from 0 to 3"),
        ({"kept_neurons": [40, 1.5]}, "'kept_neurons' holds 1.5"),
        ({"kept_neurons": 12}, "'kept_neurons' is 12"),
    ],
)
def test_impossible_width_is_named(change, message):
    with pytest.raises(InputError, match=message):
        bert.Config.from_hf(tiny.config(**change))
