"""Take one training step on a mesh of 8 devices: data over one axis, the frozen weights over the other."""

import os

# Without 8 accelerators, JAX divides the CPU; this must come before the first import of JAX.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsee_jax


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + nn.Dense(128)(nn.gelu(nn.Dense(512)(x)))
        return nn.Dense(16)(x)


def main() -> dict[str, float]:
    model, tx = Model(), optax.adamw(1e-3)
    x = jax.random.normal(jax.random.key(0), (64, 128))
    labels = jnp.argmax(x[:, :16], -1)
    params = model.init(jax.random.key(1), x)["params"]
    config = dsee_jax.DeltaConfig(targets=("Dense_./kernel",), rank=4, nonzeros=64)
    adapter = dsee_jax.deltas.init(params, config, key=jax.random.key(2))

    @jax.jit
    def step(params, adapter, state, x, labels):
        def loss(deltas):
            logits = dsee_jax.apply(model, params, adapter.replace(deltas=deltas), x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(adapter.deltas)
        changes, state = tx.update(gradients, state, adapter.deltas)
        return value, gradients, adapter.replace(deltas=optax.apply_updates(adapter.deltas, changes)), state

    arguments = (params, adapter, tx.init(adapter.deltas), x, labels)
    value, gradients, *_ = step(*arguments)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    on = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    kernels = jax.tree.map(lambda w: on(None, "model") if w.ndim == 2 else on("model"), params)
    # The adapter and the state of the optimizer are small: every device has them whole.
    layout = (kernels, on(), on(), on("data"), on("data"))
    mesh_value, mesh_gradients, *_ = step(*(jax.device_put(*pair) for pair in zip(arguments, layout, strict=True)))
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), jax.device_get(mesh_gradients), gradients)
    difference = max(abs(mesh_value - value), *jax.tree.leaves(differences))
    numbers = {"devices": len(mesh_value.devices()), "loss": float(mesh_value), "difference": float(difference)}
    print(numbers)
    return numbers


if __name__ == "__main__":
    main()
