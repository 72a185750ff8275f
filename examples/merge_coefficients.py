"""Learn by gradient how much of each fine-tuned model goes into each layer of their merge, from 200 labelled images.

A network that reads digits is tuned further on 0 to 4, and apart on 5 to 9; the coefficients start from those of RankMean.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import merge

network = nn.Sequential([layer for _ in range(3) for layer in (nn.Dense(64), nn.relu)] + [nn.Dense(10)])


def loss(params, images, labels):
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(network.apply({"params": params}, images), labels).mean()


def fit(function, values, data, steps, rate):
    """Return ``values``, any pytree, after ``steps`` of Adam on ``function(values, *data)``."""
    tx = optax.adam(rate)

    def step(state, _):
        updates, memory = tx.update(jax.grad(function)(state[0], *data), state[1])
        return (optax.apply_updates(state[0], updates), memory), None

    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[0][0])((values, tx.init(values)))


def train():
    """Return the base, the two fine-tuned models, and the images and labels that none of them has seen."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    start = network.init(jax.random.key(0), images[:1])["params"]
    base = fit(loss, start, (images[200:], labels[200:]), 40, 1e-3)
    parts = [(images[200:][part], labels[200:][part]) for part in (labels[200:] < 5, labels[200:] >= 5)]
    return base, [fit(loss, base, part, 100, 2e-3) for part in parts], images[:200], labels[:200]


def main():
    """Return the loss with RankMean's coefficients, the loss with the learnt coefficients, and these by layer."""
    base, tuned, *data = train()

    def objective(logits):
        return loss(merge.linear(base, tuned, weight=jax.tree.map(jax.nn.softmax, logits)), *data)

    logits = jax.tree.map(jnp.log, merge.rankmean_coefficients(base, tuned))
    learnt = fit(objective, logits, (), 100, 0.1)
    before, after = float(objective(logits)), float(objective(learnt))
    coefficients = {layer: jax.nn.softmax(pair).tolist() for layer, pair in learnt.items()}
    print(f"loss {before:.3f} with RankMean's coefficients, {after:.3f} with these: {coefficients}")
    return before, after, coefficients


if __name__ == "__main__":
    main()
