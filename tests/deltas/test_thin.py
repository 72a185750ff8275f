"""Linen layers with uncommon attributes: the update is added as the layer itself multiplies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("layer", "orientation", "shape"),
    [
        (nn.DenseGeneral(4, axis=(-1, -2)), "in_in_out", (2, 3, 6)),
        (nn.DenseGeneral((2, 2), axis=(1, -1)), "in_in_out_out", (2, 3, 5, 6)),
        (nn.Conv(4, (1, 1), strides=(1, 2)), "1_1_in_out", (2, 3, 4, 6)),
        (nn.Conv(4, (1,), padding=((1, 1),)), "1_in_out", (2, 3, 6)),
    ],
    ids=["unsorted axes", "apart axes", "strides", "padding"],
)
def test_attached_layer_equals_the_materialised_one(layer, orientation, shape):
    x = jax.random.normal(KEY, shape)
    params = layer.init(KEY, x)["params"]
    config = dsee_jax.DeltaConfig(
        targets=[("kernel", {"orientation": orientation})], rank=2, nonzeros=4, support="random"
    )
    adapter = dsee_jax.deltas.init(params, config, key=KEY)
    np.testing.assert_array_equal(dsee_jax.apply(layer, params, adapter, x), layer.apply({"params": params}, x))
    adapter = adapter.replace(deltas=jax.tree.map(lambda array: array + 0.1 * jnp.sign(array) + 0.1, adapter.deltas))
    plain = layer.apply({"params": dsee_jax.materialize(params, adapter)}, x)
    np.testing.assert_allclose(dsee_jax.apply(layer, params, adapter, x), plain, atol=1e-5)
