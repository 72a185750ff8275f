"""Blocks of attached updates: the models and functions that take them, nested blocks, and updates that nothing reads."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax
from dsee_jax.errors import InputError
from updated import KEY, Model, X, made


def test_an_update_that_no_module_reads_is_named():
    class Partly(nn.Module):
        @nn.compact
        def __call__(self, x, deep=False):
            x = nn.Dense(6, name="dense")(x)
            return nn.Dense(4, name="deep")(x) if deep or self.is_initializing() else x

    model = Partly()
    params, adapter = made(model, (".*/kernel",))
    message = r"the update of 'deep/kernel' \(1 of 2 updates\) reached no module: no call in the block read this kernel"
    with pytest.raises(InputError, match=message):
        dsee_jax.apply(model, params, adapter, X)
    with dsee_jax.attached(adapter):
        model.apply({"params": params}, X)
        model.apply({"params": params}, X, deep=True)
    with pytest.raises(InputError, match=r"the update of 'deep/kernel' \(2 of 2 updates\)"), dsee_jax.attached(adapter):
        pass
    with pytest.raises(RuntimeError, match="an error of the user"), dsee_jax.attached(adapter):
        raise RuntimeError("an error of the user")


def test_a_jitted_function_has_the_updates_of_the_block_that_calls_it():
    """Functions that were traced outside of a block, in a block of other updates, and beside an eager call."""
    params, first = made()
    second = first.replace(deltas=jax.tree.map(lambda leaf: -2 * leaf, first.deltas))
    model = Model()
    jitted = jax.jit(lambda x: model.apply({"params": params}, x))
    plain = jitted(X)
    for adapter in (first, second, first):
        with dsee_jax.attached(adapter):
            outputs = jitted(X)
            eager = model.apply({"params": params}, X)
        np.testing.assert_allclose(outputs, eager, rtol=1e-5)
        np.testing.assert_allclose(outputs, dsee_jax.apply(model, params, adapter, X), rtol=1e-5)
        assert float(jnp.max(jnp.abs(outputs - plain))) > 0.1
    np.testing.assert_array_equal(jitted(X), plain)


def test_a_block_in_a_jitted_function_is_compiled_once():
    params, adapter = made()
    traces = []

    @jax.jit
    def forward(adapter, x):
        traces.append(1)
        with dsee_jax.attached(adapter):
            return Model().apply({"params": params}, x)

    for factor in (1.0, 2.0, 3.0):
        each = adapter.replace(deltas=jax.tree.map(lambda leaf, factor=factor: factor * leaf, adapter.deltas))
        np.testing.assert_allclose(forward(each, X), dsee_jax.apply(Model(), params, each, X), rtol=1e-5)
    assert traces == [1]


def test_adapters_in_nested_blocks_add_up():
    params, first = made()
    _, second = made(targets=("dense", ("heads", {"orientation": "in_out_out"})))
    expected = Model().apply({"params": dsee_jax.materialize(dsee_jax.materialize(params, first), second)}, X)
    for outer, inner in ((first, second), (second, first)):
        with dsee_jax.attached(outer), dsee_jax.attached(inner):
            outputs = Model().apply({"params": params}, X)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4)


def test_a_bound_module_takes_the_updates_of_each_block():
    class SetUp(nn.Module):
        def setup(self):
            self.dense = nn.Dense(6)

        def __call__(self, x):
            return self.dense(x)

    params, first = made(SetUp())
    second = first.replace(deltas=jax.tree.map(lambda leaf: -2 * leaf, first.deltas))
    bound = SetUp().bind({"params": params})
    plain = bound(X)
    for adapter in (first, second):
        with dsee_jax.attached(adapter):
            outputs = bound(X), bound.dense(X)
        for output in outputs:
            np.testing.assert_allclose(output, dsee_jax.apply(SetUp(), params, adapter, X), rtol=1e-6)
    np.testing.assert_array_equal(bound(X), plain)


@pytest.mark.parametrize("norm", [nn.WeightNorm, lambda layer: nn.SpectralNorm(layer)])
def test_a_kernel_that_a_module_normalises_in_place_is_named(norm):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            wrapped = norm(nn.Dense(6, name="dense"))
            return wrapped(x) if isinstance(wrapped, nn.WeightNorm) else wrapped(x, update_stats=False)

    variables = Normed().init(KEY, X)
    params, adapter = made(Normed())
    message = "'dense/kernel' takes no update: (Weight|Spectral)Norm normalises the params"
    with pytest.raises(InputError, match=message), dsee_jax.attached(adapter):
        Normed().apply(variables | {"params": params}, X)


@pytest.mark.slow
def test_a_block_ends_without_asserts_too():
    """``python -O`` leaves out the assert in which Flax ends an interceptor."""
    program = """
import flax.linen as nn, jax.numpy as jnp
from dsee_jax.deltas.attach import intercepted
def doubled(call, args, kwargs, context):
    return 2 * call(*args, **kwargs)
model, x = nn.Dense(1, kernel_init=nn.initializers.ones), jnp.ones((1, 1))
params = {"params": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}
with intercepted(doubled):
    print(model.apply(params, x).item())
print(model.apply(params, x).item())
"""
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0", "1.0"]
