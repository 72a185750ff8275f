"""Serve many adapters of one base model in one batch: every row of the batch has an adapter of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import dsee_jax


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x)


def tuned(adapter: dsee_jax.Adapter, key: jax.Array) -> dsee_jax.Adapter:
    """An adapter as a user would have tuned it: random here."""
    leaves, structure = jax.tree.flatten(adapter.deltas)
    keys = jax.random.split(key, len(leaves))
    return adapter.replace(
        deltas=structure.unflatten(
            [leaf + 0.05 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        )
    )


def main(users: int = 8) -> dict[str, float]:
    model = Model()
    x = jax.random.normal(jax.random.key(0), (users, 64))
    params = model.init(jax.random.key(1), x)["params"]
    config = dsee_jax.DeltaConfig(targets=("Dense_./kernel",), rank=4, nonzeros=64)
    # One key for all: the adapters share the supports of their sparse parts.
    base = dsee_jax.deltas.init(params, config, key=jax.random.key(2))
    adapters = [tuned(base, key) for key in jax.random.split(jax.random.key(3), users)]

    # An adapter is a pytree: stacked adapters have a leading axis of users, and `vmap` takes it apart.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    forward = jax.jit(jax.vmap(lambda adapter, x: dsee_jax.apply(model, params, adapter, x)))
    together = forward(stacked, x)

    alone = jnp.stack([dsee_jax.apply(model, params, adapter, row) for adapter, row in zip(adapters, x, strict=True)])
    numbers = {
        "users": users,
        "parameters of one user": sum(leaf.size for leaf in jax.tree.leaves(base.deltas)),
        "difference to each alone": float(jnp.max(jnp.abs(together - alone))),
        "difference to the base": float(jnp.max(jnp.abs(together - model.apply({"params": params}, x)))),
    }
    print(numbers)
    return numbers


if __name__ == "__main__":
    main()
