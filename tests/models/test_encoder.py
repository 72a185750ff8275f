"""Every encoder: architecture tables, heads, masks, token types, dropout, dtype. tests/ckpt/test_parity.py uses torch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import models, tree
from dsee_jax.ckpt import hf_names
from dsee_jax.errors import InputError

FAMILIES = [name for name in tiny.FAMILIES if name != "xlm-roberta"]
"""XLM-RoBERTa differs from RoBERTa by its names only."""


def _model(family="bert", task="sequence-classification", dtype="float32", num_hidden_layers=1, **changes):
    fields, architecture = tiny.config(family, num_hidden_layers=num_hidden_layers, **changes), models.find(family)
    model = architecture.model(architecture.config.from_hf(fields, num_labels=3, dtype=dtype), task)
    return model, tiny.params(model, np.zeros((1, 1), np.int32))


def _batch(model, **options):
    return tiny.batch(types=model.config.type_vocab_size, **options)


@functools.cache
def _jitted(model, deterministic):
    return jax.jit(functools.partial(model.apply, deterministic=deterministic))


def _run(model, params, **inputs):
    return np.asarray(_jitted(model, True)({"params": params}, **inputs))


def _train(model, params, key, **inputs):
    return np.asarray(_jitted(model, False)({"params": params}, **inputs, rngs={"dropout": jax.random.key(key)}))


PATHS = re.findall(
    r"\S+",
    """
embeddings/word/embedding embeddings/norm/scale embeddings/norm/bias
encoder/layer_1/attention/query/kernel encoder/layer_1/attention/query/bias
encoder/layer_1/attention/value/kernel encoder/layer_1/attention/output/kernel
encoder/layer_1/attention_norm/scale encoder/layer_1/mlp_norm/bias
encoder/layer_1/mlp/up/kernel encoder/layer_1/mlp/down/bias
pooler/kernel pooler/bias classifier/kernel classifier/bias
""",
)
COUNTS = {
    "bert": 5 + 2 * 16 + 4,
    "roberta": 5 + 2 * 16 + 4,
    "deberta": 4 + 2 * (16 - 1 + 3) + 4,
    "mpnet": 5 + 2 * 16 + 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_param_paths_are_stable(family):
    """Rules in configs, adapters and recipes use these paths for every architecture."""
    _, params = _model(family, num_hidden_layers=2)
    flat = tree.flatten(params)
    assert set(PATHS) <= flat.keys()
    assert len(flat) == COUNTS[family]
    assert flat["encoder/layer_0/mlp/up/kernel"].shape == (24, 40)
    assert flat["classifier/kernel"].shape == (24, 3)


TASKS = ("sequence-classification", "token-classification", "question-answering", "features")


@pytest.mark.parametrize("family", [name for name in models.MODELS if name not in decoders.KINDS])
def test_architecture_covers_every_param_once(family):
    """hf_names has every path once, axes one name per array axis; head and cuts match existing paths."""
    architecture, flat = models.find(family), {}
    # With every optional param.
    more = {"position_biased_input": True, "type_vocab_size": 2} if family == "deberta" else {}
    for task in TASKS:
        model, params = _model(family, task, num_hidden_layers=2, **more)
        flat |= tree.flatten(params)
        names = [name for name, _ in hf_names.names(model).values()]
        shared = sum(layout.parts - 1 for _, _, layout in architecture.hf_names if layout.part == 0)
        assert len(names) - len(set(names)) == 2 * shared
    paths, _, _ = zip(*architecture.hf_names, strict=True)
    assert {re.sub(r"layer_\d+", "layer_{i}", path) for path in flat} == set(paths)
    assert len(set(paths)) == len(paths)
    for path, axes in tree.assign(architecture.axes, flat).items():
        assert len(axes) == flat[path].ndim, path
    heads = tree.select(architecture.head, flat)
    assert {path.partition("/")[0] for path in heads} == {"pooler", "classifier", "token_classifier", "span"}
    sizes = {"heads": 24, "neurons": 40}
    for kind, layers in models.cuts(model).items():
        assert len(layers) == 2
        for units in layers:
            for path, (axis, _) in units.axes.items():
                assert flat[path].shape[axis] == sizes[kind], path
            assert set(units.scored) <= units.axes.keys()
    up = tree.assign(architecture.axes, flat)["encoder/layer_1/mlp/up/kernel"]
    assert up == ("embed", "mlp")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("task", "shape", "head"),
    [
        ("sequence-classification", (3, 3), {"pooler", "classifier"}),
        ("token-classification", (3, 12, 3), {"token_classifier"}),
        ("question-answering", (3, 12, 2), {"span"}),
        ("features", (3, 12, 24), set()),
    ],
)
def test_task_determines_outputs_and_head(family, task, shape, head):
    """Each task has its own params and output shape."""
    model, params = _model(family, task)
    assert params.keys() - {"embeddings", "encoder"} == head
    outputs = _run(model, params, **_batch(model))
    assert (outputs.shape, outputs.dtype) == (shape, jnp.float32)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_updates_attach_to_every_kernel(family, task):
    """Attached updates equal folded updates, also on the kernels of the head."""
    model, params = _model(family, task)
    config = dsee_jax.DeltaConfig(targets=(".*/kernel",), rank=2, alpha=4.0, nonzeros=3, support="random")
    adapter = tiny.adapter(params, config, spread=0.2)
    attached = jax.jit(functools.partial(dsee_jax.apply, model))(params, adapter, _batch(model))
    folded = _run(model, jax.jit(dsee_jax.materialize)(params, adapter), **_batch(model))
    np.testing.assert_allclose(attached, folded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_outputs(family):
    """A single row without padding has the same logits as in a padded batch."""
    model, params = _model(family)
    batch = _batch(model)
    together = _run(model, params, **batch)
    for row in range(3):
        short = {name: x[row : row + 1, : 12 - 2 * row] for name, x in batch.items()}
        np.testing.assert_allclose(_run(model, params, **short), together[row : row + 1], atol=2e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_missing_mask_and_types_have_defaults(family):
    """None means all tokens and type 0, bit for bit in an uncompiled call."""
    model, params = _model(family)
    ids = _batch(model, padded=False)["input_ids"]
    expected = model.apply({"params": params}, ids, np.ones_like(ids), np.zeros_like(ids))
    np.testing.assert_array_equal(model.apply({"params": params}, ids), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_depends_on_its_key(family):
    """Training differs from evaluation, is equal for equal keys, differs for other keys, and has no dropout at rate 0."""
    model, params = _model(family, hidden_dropout_prob=0.2)
    batch = _batch(model)

    first = _train(model, params, 0, **batch)
    np.testing.assert_array_equal(_train(model, params, 0, **batch), first)
    assert (_train(model, params, 1, **batch) != first).any()
    assert (_run(model, params, **batch) != first).any()
    model, params = _model(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    np.testing.assert_array_equal(_train(model, params, 0, **batch), _run(model, params, **batch))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "rate"), [(family, rate) for family in FAMILIES for rate in models.find(family).config.DROPOUTS]
)
def test_each_dropout_rate_reaches_the_model(family, rate):
    """One rate at a time, the others 0."""
    off = dict.fromkeys(models.find(family).config.DROPOUTS, 0.0)
    model, params = _model(family, **(off | {rate: 0.5}))
    batch = _batch(model)
    assert np.abs(_train(model, params, 0, **batch) - _run(model, params, **batch)).max() > 1e-3
    fixed = model.clone(config=model.config.with_dropout(0.0))
    np.testing.assert_array_equal(_train(fixed, params, 0, **batch), _run(model, params, **batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_and_returns_float32(family):
    """Params stay float32; only the matrix products are in bfloat16."""
    model, params = _model(family)
    half, _ = _model(family, dtype="bfloat16")
    batch = _batch(model)
    actual, expected = _run(half, params, **batch), _run(model, params, **batch)
    assert actual.dtype == jnp.float32
    assert 0 < np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()
    abstract = jax.eval_shape(half.init, jax.random.key(0), batch["input_ids"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize(
    ("family", "changes", "longest"),
    [
        ("bert", {}, 32),
        ("roberta", {}, 31),
        ("roberta", {"pad_token_id": 1}, 30),
        ("mpnet", {}, 30),
        ("deberta", {"position_biased_input": True}, 32),
        ("deberta", {}, None),
    ],
)
def test_too_long_batch_is_refused(family, changes, longest):
    """RoBERTa has max_position_embeddings - pad_token_id - 1 positions; a model without a table has no limit."""
    model, params = _model(family, **changes)
    assert model.config.longest == longest
    ids = np.full((1, longest or 40), 7, np.int32)
    assert np.isfinite(_run(model, params, input_ids=ids)).all()
    if longest is not None:
        with pytest.raises(InputError, match=f"{longest + 1} tokens long and the model has {longest} positions"):
            model.apply({"params": params}, np.zeros((1, longest + 1), np.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_id_outside_the_vocabulary_gives_nan(family):
    """The output is never that of another token."""
    model, params = _model(family)
    ids = np.full((1, 4), model.config.vocab_size, np.int32)
    assert np.isnan(_run(model, params, input_ids=ids)).all()


def test_shapes_are_traced_once_and_returned_anew(monkeypatch):
    """A start asks for them twenty times; callers change the tree that they get."""
    calls, (model, params) = [], _model(hidden_act="relu")
    init = type(model).init
    monkeypatch.setattr(type(model), "init", lambda *args, **options: calls.append(True) or init(*args, **options))
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    for each in (model, model.clone()):
        shapes = models.shapes(each)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == expected
        shapes.clear()
    assert calls == [True]
    wider = model.clone(config=model.config.with_widths(neurons=(3,)))
    assert models.shapes(wider)["encoder"]["layer_0"]["mlp"]["up"]["bias"].shape == (3,)
