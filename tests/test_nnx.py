"""NNX modules with an adapter attached compute as the materialised modules do, in every transformation of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dsee_jax
from dsee_jax import DeltaConfig, InputError, tree
from dsee_jax.nnx import Delta, Support

KEY = jax.random.key(0)
RULES = {
    "query": "in_out_out",
    "output": "in_in_out",
    "einsum": "out_in_out",
    "pointwise": "1_1_in_out",
    "convolution": "1_in_out",
}


class Doubled(nnx.Linear):
    """A subclass that calls its parent with another input."""

    def __call__(self, inputs):
        return super().__call__(2.0 * inputs) + 1.0


class Raw(nnx.Module):
    """Kernels outside of any layer of Flax."""

    def __init__(self):
        self.w = nnx.Param(jax.random.normal(KEY, (6, 6)))
        self.more = nnx.Dict(v=nnx.Param(jax.random.normal(KEY, (6, 6))))
        self.list = nnx.List([nnx.Param(jax.random.normal(KEY, (6, 6)))])

    def __call__(self, x):
        for kernel in [self.w, *self.more.values(), *self.list]:
            x = jnp.tanh(x @ kernel)
        return x


class Tied(nnx.Module):
    """An embedding that is the kernel of the output too, and a parent that reads the kernel of its child."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 6, rngs=rngs)
        self.head = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.head.kernel = self.embed.embedding
        self.other = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return self.head(x) + self.embed(jnp.argmax(x, axis=-1)) + x @ self.other.kernel[...].T


def rounded(x, w, dims, precision=None, **options):
    """A product of another kind: of rounded inputs."""
    return jax.lax.dot_general(jnp.round(x), w, dims, precision=precision)


MODULES = {
    "linear": lambda rngs: nnx.Linear(6, 4, rngs=rngs),
    "linear without bias": lambda rngs: nnx.Linear(6, 4, use_bias=False, rngs=rngs),
    "subclass": lambda rngs: Doubled(6, 4, rngs=rngs),
    "precision": lambda rngs: nnx.Linear(6, 4, precision="highest", rngs=rngs),
    "query": lambda rngs: nnx.LinearGeneral(6, (2, 3), rngs=rngs),
    "output": lambda rngs: nnx.LinearGeneral((3, 6), 4, axis=(-1, -2), rngs=rngs),
    "einsum": lambda rngs: nnx.Einsum("bti,hio->btho", (2, 6, 3), (2, 3), rngs=rngs),
    "pointwise": lambda rngs: nnx.Conv(6, 4, (1, 1), rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(6, 4, (1,), strides=2, rngs=rngs),
    "embedding": lambda rngs: nnx.Sequential(lambda x: jnp.argmax(x, -1), nnx.Embed(6, 6, rngs=rngs)),
    "raw": lambda rngs: Raw(),
    "tied": Tied,
    "lora": lambda rngs: nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs),
}
X = jax.random.normal(KEY, (2, 3, 6))
KERNELS = ".*(kernel|embedding|w|v|list/0)"


def build(make, **options):
    """A module and an adapter with random updates."""
    module = make(nnx.Rngs(0))
    orientation = next((axes for name, axes in RULES.items() if MODULES.get(name) is make), None)
    targets = [KERNELS if orientation is None else (KERNELS, {"orientation": orientation})]
    config = DeltaConfig(targets=targets, rank=2, nonzeros=4, support="random", **options)
    return module, grown(dsee_jax.deltas.init(nnx.state(module, nnx.Param), config, key=KEY))


def grown(adapter):
    leaves, structure = jax.tree.flatten(adapter.deltas)
    keys = jax.random.split(KEY, len(leaves))
    values = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return adapter.replace(deltas=structure.unflatten(values))


def zero(adapter):
    return adapter.replace(deltas=jax.tree.map(jnp.zeros_like, adapter.deltas))


def materialised(module, adapter):
    plain = nnx.clone(module)
    nnx.update(plain, dsee_jax.materialize(nnx.state(module, nnx.Param), adapter))
    return plain


def close(left, right, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"atol": 2e-5, "rtol": 2e-5} | options), left, right)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_attached_module_equals_the_materialised_one(make):
    module, adapter = build(make)
    np.testing.assert_array_equal(dsee_jax.nnx.attach(module, zero(adapter))(X), module(X))
    attached = dsee_jax.nnx.attach(module, adapter)
    assert float(jnp.max(jnp.abs(attached(X) - module(X)))) > 0.01
    close(attached(X), materialised(module, adapter)(X))

    def loss(deltas, attach):
        return jnp.sum(jnp.sin(attach(module, adapter.replace(deltas=deltas))(X)))

    gradients = jax.grad(loss)(adapter.deltas, dsee_jax.nnx.attach)
    close(gradients, jax.grad(loss)(adapter.deltas, materialised), atol=2e-4, rtol=2e-4)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    close(gradients, jax.jit(jax.grad(loss), static_argnums=1)(adapter.deltas, dsee_jax.nnx.attach), atol=2e-4)
    back = dsee_jax.nnx.adapter(attached)
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
