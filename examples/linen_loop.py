"""Tune a Linen model of your own, with batch statistics and dropout, in your own optax loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dsee_jax


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        for width in (64, 64):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x))
            x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def batch(key):
    """Return points of 16 dimensions and their labels: three rings around the origin."""
    one, two, three = jax.random.split(key, 3)
    labels, angle = jax.random.randint(one, (256,), 0, 3), jax.random.uniform(two, (256,), maxval=6.283)
    x = 0.1 * jax.random.normal(three, (256, 16))
    return x.at[:, :2].add((1.0 + labels)[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)), labels


def main(steps: int = 400) -> dict[str, float]:
    model, (x, labels) = Classifier(), batch(jax.random.key(0))
    params, stats = map(model.init(jax.random.key(1), x, train=False).get, ("params", "batch_stats"))
    config, tx = dsee_jax.DeltaConfig(["Dense_[01]/kernel"], rank=8, nonzeros=64), optax.adamw(2e-2)
    adapter = dsee_jax.deltas.init(params, config, key=jax.random.key(2))
    state = tx.init(adapter.deltas)

    @jax.jit
    def step(adapter, state, stats, key):
        def loss(deltas):
            x, labels = batch(key)
            with dsee_jax.attached(adapter.replace(deltas=deltas)):
                variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key}
                logits, updated = model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(adapter.deltas)
        changes, state = tx.update(gradients, state, adapter.deltas)
        return adapter.replace(deltas=optax.apply_updates(adapter.deltas, changes)), state, stats

    for key in jax.random.split(jax.random.key(3), steps):
        adapter, state, stats = step(adapter, state, stats, key)
    logits = model.apply({"params": dsee_jax.materialize(params, adapter), "batch_stats": stats}, x, train=False)
    with dsee_jax.attached(adapter):
        attached = model.apply({"params": params, "batch_stats": stats}, x, train=False)
    accuracy, difference = jnp.mean(logits.argmax(-1) == labels), jnp.max(jnp.abs(attached - logits))
    print(numbers := {"accuracy": float(accuracy), "attached to materialized": float(difference)})
    return numbers


if __name__ == "__main__":
    main()
