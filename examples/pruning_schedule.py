"""Gradual pruning in a training loop of your own: the schedule, the masks and optax in one jitted step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dsee_jax import masks, prune

STEPS, EVERY = 200, 10
SPARSITY = prune.cubic(0.8, steps=150, begin=20)

network = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(1)])


def optimizer(kept):
    """Return AdamW for some masks; its state fits all masks, so they may change from step to step."""
    return optax.chain(optax.adamw(1e-2), masks.keep(kept))


def draw(params, kept, sparsity):
    """Return masks of the two hidden kernels, by magnitude."""
    rules = ["layers_[02]/kernel"]
    return prune.unstructured(params, None, rules, score="W", sparsity=sparsity, keep=kept)


def mean_square(params, x, y):
    """Return the loss."""
    return jnp.mean((network.apply({"params": params}, x)[:, 0] - y) ** 2)


@jax.jit
def step(number, params, state, kept, x, y):
    """Return the new params, state and masks, and the loss; the masks shrink at every tenth step."""
    kept = jax.lax.cond(number % EVERY == 0, lambda: draw(params, kept, SPARSITY(number)), lambda: kept)
    params = masks.apply(params, kept)
    loss, gradient = jax.value_and_grad(mean_square)(params, x, y)
    updates, state = optimizer(kept).update(gradient, state, params)
    return optax.apply_updates(params, updates), state, kept, loss


def main():
    """Train; print and return the final sparsity and loss, and return the params."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x[:, 0]) * x[:, 1]
    params = network.init(jax.random.key(1), x)["params"]
    kept = draw(params, None, 0.0)
    state = optimizer(kept).init(params)
    for number in range(STEPS):
        params, state, kept, loss = step(number, params, state, kept, x, y)
    sparsity = 1 - masks.density(kept)
    print(f"sparsity {sparsity:.4f}, loss {loss:.4f}")
    return sparsity, float(loss), params


if __name__ == "__main__":
    main()
