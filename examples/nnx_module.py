"""DSEE in the idiom of NNX: tune a model that reads digits to digits on their side, prune it, and write the updates in."""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import dsee_jax

HEADS = ("attention/(query|value)/kernel", {"orientation": "in_out_out"})  # (width, heads, head size)
CONFIG = dsee_jax.DeltaConfig(targets=[HEADS, "hidden", "head"], rank=4, nonzeros=32, support="magnitude")


class Reader(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.hidden, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):  # (batch, rows, columns)
        x = images + self.attention(images)
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def loss(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def fit(model, kind, images, labels, steps):
    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, kind))(model, images, labels))

    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=kind)
    for _ in range(steps):
        step(model, optimizer)


def main():
    """Return the losses on turned digits before and after, the tuned model, and the plain one with the updates written in."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8) / 16
    turned, model = images.swapaxes(1, 2), Reader(nnx.Rngs(0))
    fit(model, nnx.Param, images, labels, 80)
    params = nnx.state(model, nnx.Param)
    tuned = dsee_jax.nnx.attach(model, dsee_jax.deltas.init(params, CONFIG, key=jax.random.key(0)))
    fit(tuned, dsee_jax.nnx.Delta, turned, labels, 80)
    masks = dsee_jax.prune.unstructured(params, dsee_jax.nnx.adapter(tuned), ["hidden"], sparsity=0.5)
    nnx.update(tuned, dsee_jax.masks.apply(params, masks))
    fit(tuned, dsee_jax.nnx.Delta, turned, labels, 40)
    weights = dsee_jax.materialize(nnx.state(tuned, nnx.Param), dsee_jax.nnx.adapter(tuned))
    plain = nnx.merge(nnx.graphdef(model), weights)
    before, after = (float(loss(each, turned, labels)) for each in (model, plain))
    print(f"loss on turned digits: {before:.3f} before, {after:.3f} tuned and half of the hidden layer pruned")
    return before, after, tuned, plain


if __name__ == "__main__":
    main()
