"""NNX modules with an adapter attached compute as the materialised modules do, in every transformation of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import compiled
import dsee_jax
import tiny
from dsee_jax import DeltaConfig, InputError, tree
from dsee_jax.nnx import Delta

KEY = jax.random.key(0)
RULES = {
    "query": "in_out_out",
    "output": "in_in_out",
    "einsum": "out_in_out",
    "pointwise": "1_1_in_out",
    "convolution": "1_in_out",
}


def normal(*shape, seed=0, size=1.0):
    return jax.device_put((size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32))


class Doubled(nnx.Linear):
    """A subclass that calls its parent with another input."""

    def __call__(self, inputs):
        return super().__call__(2.0 * inputs) + 1.0


class Raw(nnx.Module):
    """Kernels outside of any layer of Flax."""

    def __init__(self):
        self.w = nnx.Param(normal(6, 6))
        self.more = nnx.Dict(v=nnx.Param(normal(6, 6)))
        self.list = nnx.List([nnx.Param(normal(6, 6))])

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
X = normal(2, 3, 6)
KERNELS = ".*(kernel|embedding|w|v|list/0)"


def made(make):
    """A module with random variables, all floating; its initialisation would be compiled operation by operation."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    fill = lambda leaf: jax.device_put((0.4 * draw.normal(size=leaf.shape)).astype(leaf.dtype))
    return nnx.merge(graph, jax.tree.map(fill, state))


def build(make, **options):
    """A module and an adapter with random updates."""
    module = made(make)
    orientation = next((axes for name, axes in RULES.items() if MODULES.get(name) is make), None)
    targets = [KERNELS if orientation is None else (KERNELS, {"orientation": orientation})]
    config = DeltaConfig(targets=targets, rank=2, nonzeros=4, support="random", **options)
    return module, grown(module, config)


def grown(module, config):
    """An adapter of a module, with random updates."""
    return tiny.adapter(nnx.state(module, nnx.Param), config, seed=1, spread=0.3)


def zero(adapter):
    return adapter.replace(deltas=jax.tree.map(lambda leaf: jax.device_put(np.zeros_like(leaf)), adapter.deltas))


def materialised(module, adapter):
    plain = nnx.clone(module)
    nnx.update(plain, jax.jit(dsee_jax.materialize)(nnx.state(module, nnx.Param), adapter))
    return plain


def close(left, right, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"atol": 2e-5, "rtol": 2e-5} | options), left, right)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_attached_module_equals_the_materialised_one(make):
    module, adapter = build(make)
    plain = np.asarray(module(X))
    np.testing.assert_array_equal(dsee_jax.nnx.attach(module, zero(adapter))(X), plain)
    attached = dsee_jax.nnx.attach(module, adapter)
    outputs = np.asarray(attached(X))
    assert np.max(np.abs(outputs - plain)) > 0.01
    close(outputs, materialised(module, adapter)(X))

    back = dsee_jax.nnx.adapter(attached)
    assert jax.tree.structure(back) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_gradients_equal_those_of_the_materialised_module_in_float64(make):
    def wide(values):
        widened = lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x
        return jax.tree.map(lambda x: jax.device_put(widened(np.asarray(x))), values)

    def loss(deltas, attach):
        return jnp.sum(jnp.sin(attach(module, adapter.replace(deltas=deltas))(x)))

    with jax.enable_x64(True):
        module, adapter = build(make)
        x = wide(X)
        nnx.update(module, wide(nnx.state(module, nnx.Param)))
        adapter = wide(adapter)
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        gradients = gradient(adapter.deltas, dsee_jax.nnx.attach)
        assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
        close(gradients, gradient(adapter.deltas, materialised), atol=1e-10, rtol=1e-10)


class Block(nnx.Module):
    """Attention, a normalisation with statistics, a dropout and a perceptron."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 12, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)])

    def __call__(self, x):
        up, down = self.layers
        return self.dropout(self.norm(x + self.attention(x))) + down(nnx.gelu(up(x)))


TARGETS = (
    ("attention/(query|key|value)/kernel", {"orientation": "in_out_out"}),
    ("attention/out/kernel", {"orientation": "in_in_out"}),
    "layers/.*/kernel",
)


@pytest.fixture(scope="module")
def block():
    """A block in evaluation mode and an adapter of its six kernels."""
    module = nnx.jit(lambda: Block(nnx.Rngs(0)))()
    module.eval()
    config = DeltaConfig(targets=TARGETS, rank=2, nonzeros=4, support="random", alpha=3.0, scale_sparse=False)
    return module, grown(module, config)


def test_a_model_with_attention_equals_the_materialised_one(block):
    module, adapter = block
    expected = nnx.jit(lambda module, x: module(x))(materialised(module, adapter), X)
    attached = dsee_jax.nnx.attach(module, adapter)
    close(attached(X), expected)
    close(nnx.remat(lambda m, x: m(x))(attached, X), expected)
    graph, state = nnx.split(attached)
    close(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X), expected)


def test_the_updates_of_each_call_of_attach_compile_once(block):
    module, adapter = block
    traces = []

    @nnx.jit
    def run(attached, x):
        traces.append(1)
        return attached(x)

    outputs = [run(dsee_jax.nnx.attach(module, each), X) for each in (adapter, zero(adapter), adapter)]
    assert len(traces) == 1
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_training_in_the_idiom_of_nnx_changes_the_updates_alone(block):
    module, adapter = block
    attached = dsee_jax.nnx.attach(module, adapter)
    attached.train()
    optimizer = nnx.Optimizer(attached, optax.sgd(0.1), wrt=Delta)

    @nnx.jit
    def step(model, optimizer, x):
        gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 2), argnums=nnx.DiffState(0, Delta))(model)
        optimizer.update(model, gradients)
        return gradients

    before = nnx.state(attached, nnx.Param)
    gradients = step(attached, optimizer, X)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(attached, nnx.Param), before)
    trained = dsee_jax.nnx.adapter(attached)
    flat = tree.flatten(adapter.deltas)
    for path, value in tree.flatten(gradients).items():
        name = path.replace("_update/", "/")
        close(tree.flatten(trained.deltas)[name], np.asarray(flat[name]) - 0.1 * np.asarray(value))
    assert len(flat) == 6 * 3
    jax.tree.map(np.testing.assert_array_equal, trained.supports, adapter.supports)
    assert (trained.scale, trained.scale_sparse, trained.orientations) == (1.5, False, adapter.orientations)


def test_statistics_and_random_counters_change_in_the_attached_module_alone(block):
    module, adapter = block
    before = nnx.state(module)
    attached = dsee_jax.nnx.attach(module, adapter)
    attached.train()
    first, second = attached(X), attached(X)
    assert not np.array_equal(first, second)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), _raw(nnx.state(module)), _raw(before))
    assert np.any(attached.norm.mean[...])
    # In a traced loss the statistics come out as a second result.
    whole = lambda deltas: dsee_jax.nnx.attach(module, adapter.replace(deltas=deltas))

    def loss(deltas):
        attached = whole(deltas)
        attached.train()
        return jnp.sum(attached(X)), nnx.state(attached, nnx.BatchStat)

    _, statistics = jax.jit(jax.grad(loss, has_aux=True))(adapter.deltas)
    again = whole(adapter.deltas)
    again.train()
    again(X)
    close(statistics["norm"]["mean"][...], again.norm.mean[...])


def _raw(state):
    return {path: jax.random.key_data(x) if path.endswith("key") else x for path, x in tree.flatten(state).items()}


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_modules_under_scan_and_vmap_equal_the_materialised_ones(axis):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 6, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.dense(x))

    layers = nnx.jit(lambda: nnx.vmap(Layer, in_axes=0, out_axes=axis)(nnx.Rngs(0).split(3)))()
    words = "stack_in_out" if axis == 0 else "in_stack_out"
    config = DeltaConfig(targets=[("dense", {"orientation": words})], rank=2, nonzeros=4, support="random")
    adapter = grown(layers, config)
    attached, plain = dsee_jax.nnx.attach(layers, adapter), materialised(layers, adapter)
    assert not np.allclose(attached.dense.kernel[...], layers.dense.kernel[...])

    scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
    ensemble = nnx.vmap(lambda layer, x: layer(x), in_axes=(axis, None))
    close(scan(X, attached), scan(X, plain))
    close(ensemble(attached, X), ensemble(plain, X))
    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(scan(X, model)), argnums=nnx.DiffState(0, Delta)))(attached)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
    back = dsee_jax.nnx.adapter(attached)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


WIDE = {
    "linear": (lambda rngs: nnx.Linear(20, 30, rngs=rngs), "in_out"),
    "linear with another product": (lambda rngs: nnx.Linear(20, 30, dot_general=rounded, rngs=rngs), "in_out"),
    "general": (lambda rngs: nnx.LinearGeneral(20, (5, 6), rngs=rngs), "in_out_out"),
    "einsum": (lambda rngs: nnx.Einsum("bi,hio->bho", (5, 20, 6), rngs=rngs), "out_in_out"),
    "pointwise": (lambda rngs: nnx.Conv(20, 30, (1,), rngs=rngs), "1_in_out"),
    "folded": (lambda rngs: nnx.LinearGeneral(20, 30, axis=(-1,), batch_axis={0: 1}, rngs=rngs), "1_in_out"),
}


@pytest.mark.parametrize(("make", "orientation"), WIDE.values(), ids=WIDE)
def test_backward_forms_no_gradient_of_a_frozen_kernel(make, orientation):
    """The layer without a thin product shows that the test sees such a gradient."""
    module = made(make)
    config = DeltaConfig(targets=[("kernel", {"orientation": orientation})], rank=2, nonzeros=4, support="random")
    adapter = tiny.adapter(nnx.state(module, nnx.Param), config)
    x = jax.device_put(np.ones((1, 20), np.float32))
    attach = lambda deltas: dsee_jax.nnx.attach(module, adapter.replace(deltas=deltas))
    y, backward = jax.vjp(lambda deltas: attach(deltas)(x), adapter.deltas)
    kinds = ("dot_general", "conv_general_dilated", "scatter", "scatter-add", "add_any")
    equations = compiled.equations(jax.make_jaxpr(backward)(y).jaxpr)
    large = [each for each in equations if each.primitive.name in kinds and each.outvars[0].aval.size == 20 * 30]
    assert bool(large) == (orientation == "1_in_out" and isinstance(module, nnx.LinearGeneral))
    np.testing.assert_array_equal(y, module(x))


def test_wide_updates_of_another_product_are_added_to_it():
    module = made(lambda rngs: nnx.Linear(6, 4, dot_general=rounded, rngs=rngs))
    config = DeltaConfig(targets=["kernel"], rank=2, nonzeros=0)
    adapter = grown(module, config)
    delta = jax.tree.map(np.asarray, adapter.deltas["kernel"])
    added = adapter.scale * np.asarray(X) @ delta["a"] @ delta["b"]
    close(dsee_jax.nnx.attach(module, adapter)(X), np.asarray(module(X)) + added)


@pytest.mark.parametrize("name", ["w", "more/v", "list/0"])
def test_an_update_of_any_variable_of_a_module_takes_effect(name):
    module = Raw()
    config = DeltaConfig(targets=[f"^{name}$"], rank=2, nonzeros=4, support="random")
    adapter = grown(module, config)
    attached = dsee_jax.nnx.attach(module, adapter)
    assert list(attached.more) == ["v"]
    close(attached(X), dsee_jax.materialize(module, adapter)(X))


def test_a_kernel_with_an_update_is_written_by_nnx_update_alone(block):
    module, adapter = block
    attached = dsee_jax.nnx.attach(module, adapter)
    with pytest.raises(InputError, match="cannot be written in place: use nnx.update"):
        attached.layers[0].kernel[...] = jnp.zeros((6, 12))
    nnx.update(attached, jax.tree.map(np.zeros_like, nnx.state(attached, nnx.Param)))
    plain = dsee_jax.materialize(nnx.state(attached, nnx.Param), adapter)
    close(attached.layers[0].kernel[...], plain["layers"][0]["kernel"][...])


def test_bad_updates_are_named(block):
    module, adapter = block
    attach = dsee_jax.nnx.attach
    with pytest.raises(InputError, match="no updates"):
        dsee_jax.nnx.adapter(module)
    with pytest.raises(InputError, match="'attention/key/kernel' has an update already"):
        attach(attach(module, adapter), adapter)
    with pytest.raises(InputError, match=r"no variable 'layers/0/kernl'.*did you mean 'layers/0/kernel'"):
        attach(module, rename(adapter, "layers/0/kernel", "layers/0/kernl"))
    with pytest.raises(InputError, match=r"'layers/1/kernel' has 'a' of shape \(6, 2\).*needs \(12, 2\)"):
        attach(module, rename(adapter, "layers/0/kernel", "layers/1/kernel"))
    turned = tuple((path, "in_in_out" if axes == "in_out_out" else "in_out_out") for path, axes in adapter.orientations)
    with pytest.raises(InputError, match="the update of 'attention/key/kernel'"):
        attach(module, adapter.replace(orientations=turned))
    square = nnx.LinearGeneral(4, (4, 4), rngs=nnx.Rngs(0))
    config = DeltaConfig(targets=[("kernel", {"orientation": "out_in_out"})], rank=2, nonzeros=0)
    with pytest.raises(InputError, match="is 'out_in_out', and LinearGeneral multiplies by it as 'in_out_out'"):
        attach(square, dsee_jax.deltas.init(square, config, key=KEY))
    normed = nnx.WeightNorm(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="'layer_instance/kernel' has an update and is inside of WeightNorm"):
        attach(normed, dsee_jax.deltas.init(normed, DeltaConfig(targets=["kernel"], rank=2, nonzeros=0), key=KEY))
    with pytest.raises(InputError, match="found dict"):
        attach({}, adapter)


def rename(adapter, old, new):
    def moved(tree_of):
        flat = tree.flatten(tree_of)
        return tree.unflatten({path.replace(old, new): value for path, value in flat.items() if new not in path})

    return adapter.replace(deltas=moved(adapter.deltas), supports=moved(adapter.supports))
