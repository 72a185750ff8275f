"""DSEE in your own loop: tune an Equinox model that reads digits to digits on their side, and prune it 2:4."""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import dsee_jax

KEYS = jax.random.split(jax.random.key(0))
TARGETS = [("layers/[01]/weight", {"orientation": "out_in"})]  # eqx.nn.Linear holds (out, in)
CONFIG = dsee_jax.DeltaConfig(targets=TARGETS, rank=8, nonzeros=64, support="magnitude")


def loss(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(images), labels).mean()


def fit(function, values, steps):
    """Return ``values``, any pytree of arrays, after ``steps`` of Adam on ``function(values)``."""
    tx = optax.adam(3e-3)

    @jax.jit
    def step(values, memory):
        updates, memory = tx.update(jax.grad(function)(values), memory)
        return optax.apply_updates(values, updates), memory

    memory = tx.init(values)
    for _ in range(steps):
        values, memory = step(values, memory)
    return values


def main():
    """Return the losses on turned digits before and after, the pruned model without its updates, and its adapter."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    turned = images.reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 64)
    weights, rest = eqx.partition(eqx.nn.MLP(64, 10, 64, 2, key=KEYS[0]), eqx.is_array)
    model = eqx.combine(fit(lambda weights: loss(eqx.combine(weights, rest), images, labels), weights, 60), rest)
    before = float(loss(model, turned, labels))

    def tuned(deltas):
        return loss(dsee_jax.materialize(model, adapter.replace(deltas=deltas)), turned, labels)

    adapter = dsee_jax.deltas.init(model, CONFIG, key=KEYS[1])
    adapter = adapter.replace(deltas=fit(tuned, adapter.deltas, 60))
    masks = dsee_jax.prune.nm(model, adapter, ["layers/[01]/weight"], n=2, m=4)
    model = dsee_jax.masks.apply(model, masks)
    adapter = adapter.replace(deltas=fit(tuned, adapter.deltas, 30))
    after = float(tuned(adapter.deltas))
    print(f"loss on turned digits: {before:.3f} before, {after:.3f} tuned and two layers pruned 2:4")
    return before, after, model, adapter


if __name__ == "__main__":
    main()
