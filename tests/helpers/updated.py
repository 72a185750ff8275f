"""A small Linen model with updates that are not zero."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import dsee_jax
from dsee_jax import deltas

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 4))


class Model(nn.Module):
    """A Dense (4, 6), and a kernel of three axes (6, 2, 3)."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 3), name="heads")(nn.Dense(6, name="dense")(x))


def made(model=None, targets=("dense",), x=X, **options):
    """Return the params of a model and an adapter of ones."""
    model = model or Model()
    params = model.init(KEY, x)["params"]
    config = dsee_jax.DeltaConfig(**{"targets": targets, "rank": 2, "nonzeros": 3, "support": "random"} | options)
    adapter = deltas.init(params, config, key=KEY)
    return params, adapter.replace(deltas=jax.tree.map(jnp.ones_like, adapter.deltas))
