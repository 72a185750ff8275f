"""The differences of MPNet from RoBERTa: the bias by head and distance, also of layers that lost heads, and its config."""

import math

import jax
import numpy as np
import pytest

import tiny
from dsee_jax.errors import InputError
from dsee_jax.models import mpnet


def test_buckets_are_those_of_t5():
    """Arithmetic of arXiv 1910.10683 in float64: exact to 7, then logarithmic to 128; keys after the query from 16 on."""
    length = 300
    actual = np.asarray(mpnet.buckets(length))
    for distance in range(-length + 1, length):
        far = abs(distance)
        expected = far if far < 8 else min(8 + int(math.log(far / 8) / math.log(16) * 8 + 1e-9), 15)
        expected += 16 if distance < 0 else 0
        assert (np.diagonal(actual, -distance) == expected).all(), distance


@pytest.mark.parametrize("columns", [(0, 1), (1,)])
def test_attention_adds_the_bias_of_its_heads(columns):
    """By loops: for all heads, and for the first queries of one of the heads."""
    size, width, length = 3, 5, 4
    generator = np.random.default_rng(0)
    module = mpnet.Attention(heads=len(columns), head_size=size, dropout_rate=0.0, width=width, columns=columns)
    x = generator.normal(size=(2, length, width)).astype(np.float32)
    bias = generator.normal(size=(1, 2, length, length)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)[:, None, None, :]
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, mask, True, None, bias))["params"]
    params = jax.tree.map(lambda leaf: generator.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), shapes)
    expected = np.zeros((2, length, width))
    for row in range(2):
        q, k, v = (x[row] @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for head, column in enumerate(columns):
            part = slice(size * head, size * head + size)
            scores = q[:, part] @ k[:, part].T / np.sqrt(size) + bias[0, column]
            weights = np.exp(np.where(mask[row, 0], scores, -np.inf))
            mixed[:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
        expected[row] = mixed @ params["output"]["kernel"] + params["output"]["bias"]
    queries = None if len(columns) == 2 else 2
    actual = jax.jit(lambda params: module.apply({"params": params}, x, mask, True, queries, bias))(params)
    np.testing.assert_allclose(actual, expected[:, :queries], atol=1e-5)


def test_positions_skip_the_id_of_hugging_face():
    """Its code has 1 for the padding, also where the config has another id."""
    config = mpnet.Config.from_hf(tiny.config("mpnet", pad_token_id=0))
    model = mpnet.Mpnet(config, "features")
    params = tiny.params(model, np.zeros((1, 1), np.int32))
    run = jax.jit(model.apply)
    ids, mask = np.array([[5, 0, 6, 0]]), np.array([[1, 1, 1, 0]])
    skipped, kept = (run({"params": params}, np.where(ids == 0, pad, ids), mask)[:, 2] for pad in (1, 7))
    table = params["embeddings"]["position"]["embedding"]
    table[[3, 4]] = table[[4, 3]]
    moved = run({"params": params}, np.where(ids == 0, 1, ids), mask)[:, 2]
    assert np.abs(skipped - moved).max() > 1e-3
    assert np.abs(kept - skipped).max() > 1e-3


def test_kept_numbers_follow_the_widths():
    """Equal numbers of heads keep their names, others are the first ones, and all heads need none."""
    config = mpnet.Config.from_hf(tiny.config("mpnet", kept_heads=[2, 1], kept_head_numbers=[[0, 2], [1]]))
    assert config.columns == ((0, 2), (1,))
    assert config.with_widths(heads=[2, 1], neurons=[7, 7]).kept_head_numbers == ((0, 2), (1,))
    assert config.with_widths(heads=[1, 2]).kept_head_numbers == ((0,), (0, 1))
    assert config.with_widths() == config.with_widths(heads=[3, 3]) == mpnet.Config.from_hf(tiny.config("mpnet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kept_heads": [2, 1]},
            r"is None; expected for each layer the increasing numbers, from 0 to 2, of .* \(2, 1\) of",
        ),
        ({"kept_heads": [2, 1], "kept_head_numbers": [[0], [1]]}, r"is \(\(0,\), \(1,\)\); expected"),
        ({"kept_head_numbers": [[0, 1, 2]]}, r"is \(\(0, 1, 2\),\); expected .* \(3, 3\) of them"),
        ({"kept_heads": [2, 1], "kept_head_numbers": [[2, 0], [1]]}, r"is \(\(2, 0\), "),
        ({"kept_heads": [2, 1], "kept_head_numbers": [[0, 3], [1]]}, r"is \(\(0, 3\), "),
        ({"kept_heads": [1, 1], "kept_head_numbers": [["0"], [1]]}, r"is \(\('0',\), "),
        ({"kept_heads": [1, 1], "kept_head_numbers": 3}, "'kept_head_numbers' is 3; expected"),
        ({"kept_heads": [1, 1], "kept_head_numbers": [0, 1]}, r"'kept_head_numbers' is \(0, 1\); expected"),
        ({"relative_attention_num_buckets": 16}, "'relative_attention_num_buckets' is 16; expected 32 or more"),
        ({"relative_attention_num_buckets": "32"}, "'relative_attention_num_buckets' is '32'"),
        ({"max_position_embeddings": 2}, "'max_position_embeddings' is 2; expected 3 or more"),
        ({"classifier_dropout": 0.1}, "unknown field 'classifier_dropout'"),
    ],
)
def test_bad_field_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        mpnet.Config.from_hf(tiny.config("mpnet", **changes))
