"""Tune Flax's own attention: its kernels have three axes, and each rule says which of them are inputs and outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dsee_jax


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(1, name="head")(x)[..., 0]


def batch(key):
    """Return sequences of tokens; the model finds those that equal the last one."""
    tokens = jax.random.randint(key, (64, 12), 0, 8)
    embeddings = jax.random.normal(jax.random.key(7), (9, 32))
    return embeddings[tokens].at[:, -1].add(embeddings[8]), (tokens == tokens[:, -1:]).astype(jnp.float32)


def main(steps: int = 200) -> dict[str, float]:
    model = Block()
    x, wanted = batch(jax.random.key(0))
    params = model.init(jax.random.key(1), x)["params"]
    targets = (
        ("attention/(query|key|value)/kernel", {"orientation": "in_out_out"}),  # (width, heads, head size)
        ("attention/out/kernel", {"orientation": "in_in_out"}),  # (heads, head size, width)
        "head",
    )
    config = dsee_jax.DeltaConfig(targets=targets, rank=1, nonzeros=32)
    adapter = dsee_jax.deltas.init(params, config, key=jax.random.key(2))
    tx = optax.adam(5e-3)
    state = tx.init(adapter.deltas)

    def loss(adapter, x, wanted):
        return optax.sigmoid_binary_cross_entropy(dsee_jax.apply(model, params, adapter, x), wanted).mean()

    @jax.jit
    def step(adapter, state, key):
        gradients = jax.grad(lambda deltas: loss(adapter.replace(deltas=deltas), *batch(key)))(adapter.deltas)
        changes, state = tx.update(gradients, state)
        return adapter.replace(deltas=optax.apply_updates(adapter.deltas, changes)), state

    before = float(loss(adapter, x, wanted))
    for key in jax.random.split(jax.random.key(3), steps):
        adapter, state = step(adapter, state, key)
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.deltas))
    numbers = {"before": before, "after": float(loss(adapter, x, wanted)), "trained parameters": trained}
    print(numbers)
    return numbers


if __name__ == "__main__":
    main()
