"""A small Linen model with updates that are not zero."""

import flax.linen as nn
import jax
import numpy as np

import dsee_jax
import tiny

KEY = jax.random.key(0)
X = jax.device_put(np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32))


class Model(nn.Module):
    """A Dense (4, 6), and a kernel of three axes (6, 2, 3)."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 3), name="heads")(nn.Dense(6, name="dense")(x))


def made(model=None, targets=("dense",), x=X, **options):
    """Return the params of a model and an adapter of ones."""
    model = model or Model()
    params = jax.device_put(tiny.params(model, x))
    config = dsee_jax.DeltaConfig(**{"targets": targets, "rank": 2, "nonzeros": 3, "support": "random"} | options)
    adapter = tiny.adapter(params, config)
    return params, adapter.replace(deltas=jax.tree.map(lambda leaf: jax.device_put(np.ones_like(leaf)), adapter.deltas))
