"""Learn EarlyBERT's coefficients in your own loop, draw the winning ticket, and cut the model down to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsee_jax
from dsee_jax.models import bert
from dsee_jax.prune import earlybert, units


def batch(key):
    """Sentences of 16 tokens; the label is whether token 7 occurs more often than token 8."""
    tokens = jax.random.randint(key, (32, 16), 5, 12)
    return tokens, (jnp.sum(tokens == 7, -1) > jnp.sum(tokens == 8, -1)).astype(jnp.int32)


def main(steps: int = 60) -> dict[str, float]:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = bert.Bert(bert.Config(vocab_size=12, **sizes))
    x, _ = batch(jax.random.key(0))
    params = model.init(jax.random.key(1), x)["params"]
    cuts, tx = dsee_jax.models.cuts(model), optax.adam(3e-3)
    trained = params, earlybert.init(cuts, params)
    state = tx.init(trained)

    @jax.jit
    def step(trained, state, key):
        def loss(trained):
            params, coefficients = trained
            x, labels = batch(key)
            with earlybert.attached(coefficients, cuts):
                logits = model.apply({"params": params}, x)
            error = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return error + 1e-3 * earlybert.penalty(coefficients)

        gradients = jax.grad(loss)(trained)
        changes, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, changes), state

    for key in jax.random.split(jax.random.key(2), steps):
        trained, state = step(trained, state, key)

    params, coefficients = trained
    kept = earlybert.draw(coefficients, heads=1, neurons=0.4)
    masks = units.masks(params, cuts, kept)
    small, small_params = dsee_jax.compact(model, params, masks)
    masked = model.apply({"params": dsee_jax.masks.apply(params, masks)}, x)
    difference = float(jnp.max(jnp.abs(small.apply({"params": small_params}, x) - masked)))
    neurons = int(sum(np.sum(layer) for layer in kept["neurons"].values()))
    numbers = {"neurons of the ticket": neurons, "difference to the masked model": difference}
    print(numbers)
    return numbers


if __name__ == "__main__":
    main()
