"""BERT: tables that cover it, masks, types, dropout, dtype. Parity with torch is in tests/ckpt/test_parity.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.models import bert


def _model(task="sequence-classification", dtype="float32", num_hidden_layers=1, **changes):
    changes["num_hidden_layers"] = num_hidden_layers
    model = bert.Bert(bert.Config.from_hf(tiny.config(**changes), num_labels=3, dtype=dtype), task)
    return model, tiny.params(model, jnp.zeros((1, 1), jnp.int32))


@functools.cache
def _jitted(model, deterministic):
    return jax.jit(functools.partial(model.apply, deterministic=deterministic))


def _run(model, params, **inputs):
    return _jitted(model, True)({"params": params}, **inputs)


def _train(model, params, key, **inputs):
    return _jitted(model, False)({"params": params}, **inputs, rngs={"dropout": jax.random.key(key)})


PATHS = re.findall(
    r"\S+",
    """
embeddings/word/embedding embeddings/position/embedding embeddings/token_type/embedding
embeddings/norm/scale embeddings/norm/bias
encoder/layer_1/attention/query/kernel encoder/layer_1/attention/key/bias
encoder/layer_1/attention/value/kernel encoder/layer_1/attention/output/kernel
encoder/layer_1/attention_norm/scale encoder/layer_1/mlp_norm/bias
encoder/layer_1/mlp/up/kernel encoder/layer_1/mlp/down/bias
pooler/kernel pooler/bias classifier/kernel classifier/bias
""",
)


def test_paths_are_the_agreed_ones():
    """Rules in configs, adapters and recipes name these paths."""
    _, params = _model(num_hidden_layers=2)
    flat = tree.flatten(params)
    assert set(PATHS) <= flat.keys()
    assert len(flat) == 5 + 2 * 16 + 4
    assert flat["encoder/layer_0/mlp/up/kernel"].shape == (24, 40)
    assert flat["classifier/kernel"].shape == (24, 3)


def test_tables_cover_every_param_once():
    """HF_NAMES is one to one, AXES has as many names as the array has axes, HEAD and CUTS match real paths."""
    _, params = _model(num_hidden_layers=2)
    flat = tree.flatten(params)
    ours, theirs, _ = zip(*bert.HF_NAMES, strict=True)
    assert {re.sub(r"layer_\d+", "layer_{i}", path) for path in flat} == set(ours)
    assert len(set(ours)) == len(set(theirs)) == len(bert.HF_NAMES)
    for path, axes in tree.assign(bert.AXES, flat).items():
        assert len(axes) == flat[path].ndim, path
    heads = tree.select(bert.HEAD, flat)
    assert set(heads) == {"pooler/kernel", "pooler/bias", "classifier/kernel", "classifier/bias"}
    sizes = {"heads": 24, "neurons": 40}
    for kind, table in bert.CUTS.items():
        for pattern, axis, _ in table["axes"]:
            assert flat[pattern.format(i=1)].shape[axis] == sizes[kind], pattern
        assert set(table["scored"]) <= {pattern for pattern, _, _ in table["axes"]}
    up = tree.assign(bert.AXES, flat)["encoder/layer_1/mlp/up/kernel"]
    assert up == ("embed", "mlp")


def test_features_have_no_head():
    """The backbone alone gives (batch, length, width), from the same params."""
    model, params = _model("features")
    assert not {"pooler", "classifier"} & params.keys()
    assert _run(model, params, input_ids=tiny.batch()["input_ids"]).shape == (3, 12, 24)


def test_padding_changes_nothing():
    """A row alone, cut to its length, has the logits it has in a padded batch."""
    model, params = _model()
    batch = tiny.batch()
    together = _run(model, params, **batch)
    for row in range(3):
        short = {name: x[row : row + 1, : 12 - 2 * row] for name, x in batch.items()}
        np.testing.assert_allclose(_run(model, params, **short), together[row : row + 1], atol=2e-5)


def test_defaults_of_mask_and_types():
    """None means all tokens and type 0."""
    model, params = _model()
    ids = tiny.batch(padded=False)["input_ids"]
    expected = _run(model, params, input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
    np.testing.assert_array_equal(_run(model, params, input_ids=ids), expected)


def test_dropout_follows_its_key():
    """Training mode differs from evaluation, repeats with the key, changes with it, and is off at rate 0."""
    model, params = _model(hidden_dropout_prob=0.2)
    batch = tiny.batch()

    first = _train(model, params, 0, **batch)
    np.testing.assert_array_equal(_train(model, params, 0, **batch), first)
    assert (_train(model, params, 1, **batch) != first).any()
    assert (_run(model, params, **batch) != first).any()
    model, params = _model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    np.testing.assert_array_equal(_train(model, params, 0, **batch), _run(model, params, **batch))


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_dropout_rate_reaches_the_model(rate):
    """One rate at a time, the others 0."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model, params = _model(**(off | {rate: 0.5}))
    batch = tiny.batch()
    assert np.abs(_train(model, params, 0, **batch) - _run(model, params, **batch)).max() > 1e-3


def test_bfloat16_is_close_and_returns_float32():
    """Params stay float32; only the products are in bfloat16."""
    model, params = _model()
    half, _ = _model(dtype="bfloat16")
    batch = tiny.batch()
    found, expected = _run(half, params, **batch), _run(model, params, **batch)
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    abstract = jax.eval_shape(half.init, jax.random.key(0), batch["input_ids"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))


def test_too_long_a_batch_is_refused():
    """Positions end at max_position_embeddings."""
    model, params = _model()
    with pytest.raises(InputError, match="33 tokens long and the model has 32 positions"):
        model.apply({"params": params}, np.zeros((1, 33), np.int32))


def test_an_id_outside_the_vocabulary_shows():
    """It gives NaN, never another token's embedding."""
    model, params = _model()
    ids = np.full((1, 4), model.config.vocab_size, np.int32)
    assert np.isnan(_run(model, params, input_ids=ids)).all()
