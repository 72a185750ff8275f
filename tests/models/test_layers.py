"""The shared layers against formulas in NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from dsee_jax.models import layers
from dsee_jax.ops import dense
from dsee_jax.ops.joint import JointDense


def test_activations_are_their_formulas():
    """The five activations against their definitions, evaluated by Python's math."""
    x = np.linspace(-4, 4, 33)
    erf = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    tanh = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    silu = [v / (1 + math.exp(-v)) for v in x]
    expected = {"gelu": erf, "gelu_new": tanh, "gelu_pytorch_tanh": tanh, "relu": np.maximum(x, 0), "silu": silu}
    assert expected.keys() == layers.ACTIVATIONS.keys()
    for name, values in expected.items():
        actual = layers.ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(actual, values, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_computed_in_float32(dtype):
    """In bfloat16 a large mean would absorb the variance; the result has the compute dtype."""
    x = (1000 + np.random.default_rng(0).normal(size=(2, 3, 16)) * 10).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 16, dtype=np.float32), np.linspace(-1, 1, 16, dtype=np.float32)
    actual = layers.LayerNorm(1e-12, dtype).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * scale + bias
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.astype(np.float32), expected, atol=1e-4 if dtype == jnp.float32 else 3e-2)


def test_dropout_is_off_if_deterministic_or_rate_zero():
    """No key is needed then; otherwise the share of zeros is the rate, and the other entries are scaled up."""
    x = np.ones((200, 200), np.float32)
    for module, deterministic in ((layers.Dropout(0.25), True), (layers.Dropout(0.0), False)):
        np.testing.assert_array_equal(module.apply({}, x, deterministic), x)
    dropped = layers.Dropout(0.25).apply({}, x, False, rngs={"dropout": jax.random.key(0)})
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.01
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)


def test_joint_dense_is_several_dense_layers():
    """With different output widths and leading axes, equal to one nn.Dense per name with the same params."""
    module = JointDense(("query", "key", "value"), (4, 6, 2))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    params = tiny.params(module, x)
    outputs = module.apply({"params": params}, x)
    assert set(params) == {"query", "key", "value"}
    for name, features, actual in zip(module.joint, module.features, outputs, strict=True):
        assert params[name]["kernel"].shape == (8, features)
        expected = nn.Dense(features).apply({"params": params[name]}, x)
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [2, 40])
def test_joint_dense_with_zero_updates_has_the_same_bits(rows, dtype):
    """With few and with many rows, one map without a bias, in the graph and out of it."""
    module = JointDense(("query", "key", "value"), (40, 60, 20), dtype, unbiased=("key",))
    x = np.random.default_rng(0).normal(size=(rows, 80)).astype(np.float32)
    params = tiny.params(module, x)
    kernels, biases = ([params[name].get(kind) for name in module.joint] for kind in ("kernel", "bias"))
    deltas = tuple({"a": np.ones((80, 2), np.float32), "b": np.zeros((2, width), np.float32)} for width in (40, 60, 20))

    def updated(x):
        return dense.joint_dense(x.astype(dtype), tuple(kernels), tuple(biases), deltas, (None,) * 3, scale=2.0)

    for wrap in (jax.jit, lambda f: f):
        actual = wrap(updated)(jnp.asarray(x))
        jax.tree.map(np.testing.assert_array_equal, actual, wrap(lambda x: module.apply({"params": params}, x))(x))


def _attention():
    module = layers.Attention(heads=2, head_size=3, dropout_rate=0.5, width=5)
    x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    mask = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)[:, None, None, :]
    params = tiny.params(module, x, mask)
    return module, x, mask, params


def test_attention_is_the_paper_formula():
    """softmax(q k^T / sqrt(d)) v per head over the visible keys, by loops; 2 heads of size 3, width 5."""
    module, x, mask, params = _attention()
    assert {name: params[name]["kernel"].shape for name in params} == {
        "query": (5, 6),
        "key": (5, 6),
        "value": (5, 6),
        "output": (6, 5),
    }
    actual = module.apply({"params": params}, x, mask, True)
    expected = np.zeros((2, 4, 5))
    for row in range(2):
        seen = np.flatnonzero(mask[row, 0, 0])
        q, k, v = (x[row] @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value"))
        mixed = np.zeros((4, 6))
        for head in (slice(0, 3), slice(3, 6)):
            weights = np.exp(q[:, head] @ k[seen, head].T / np.sqrt(3))
            mixed[:, head] = weights / weights.sum(1, keepdims=True) @ v[seen, head]
        expected[row] = mixed @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_attention_of_a_row_of_padding_is_finite():
    """Rows of padding only see no key; they must not put NaN into a gradient."""
    module, x, mask, params = _attention()
    run = jax.jit(jax.value_and_grad(lambda p: module.apply({"params": p}, x, mask & False, True).sum()))
    actual, gradient = run(params)
    assert np.isfinite(actual)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_attention_keeps_its_paths_under_scan_and_remat():
    """The shared scope of the joint projection works under lifted transforms, with a leading layer axis."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return x + layers.Attention(2, 3, 0.0, width=5, name="attention")(x, mask, True), None

    module, x, mask, params = _attention()
    scanned = nn.scan(
        nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=1
    )
    stacked = jax.tree.map(lambda leaf: leaf[None], {"attention": params})
    actual, _ = scanned().apply({"params": stacked}, x, mask)
    np.testing.assert_allclose(actual, x + module.apply({"params": params}, x, mask, True), atol=1e-6)
