"""Any Linen module takes updates unedited: a table of modules, and the contract that every row of it keeps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from flax.linen import dtypes

import compiled
import dsee_jax
import tiny
from dsee_jax.ops.joint import JointDense


def normal(*shape):
    return jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32))


X = normal(2, 3, 4)
IMAGE = normal(2, 3, 3, 4)
SPLIT = normal(2, 3, 2, 4)


def oriented(pattern, orientation):
    return (pattern, {"orientation": orientation})


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, its input, its targets, and the call that is compared."""

    model: nn.Module
    x: Any = dataclasses.field(default_factory=lambda: X)
    targets: tuple[Any, ...] = ("(.*/)?kernel",)
    call: Callable[..., Any] = lambda model, variables, x: model.apply(variables, x)
    change: Callable[[Any], Any] = lambda params: params
    """Applied to the params of ``model.init``."""


class Rescaled(nn.Dense):
    """A subclass that calls its parent with another input and changes the output."""

    @nn.compact
    def __call__(self, inputs):
        return 3.0 + 2.0 * super().__call__(jnp.sin(inputs))


class Normalised(nn.Dense):
    """A subclass with a product of its own: weight normalisation."""

    @nn.compact
    def __call__(self, inputs):
        w = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        return inputs @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))


class Own(nn.Module):
    """A module of one's own."""

    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 5))
        return jnp.tanh(x @ w) @ w.T


class Named(nn.Module):
    """A module with an attribute ``joint`` that has nothing to do with joint products."""

    joint: Any = "left elbow"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="dense")(x)


class DotGeneral:
    def __call__(self, x, w, dimensions, precision=None, preferred_element_type=None):
        return jax.lax.dot_general(x, w, dimensions, precision, preferred_element_type)


def own_promotion(*arrays, dtype=None, **options):
    """A ``promote_dtype`` of one's own."""
    return dtypes.promote_dtype(*arrays, dtype=dtype, **options)


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(5, name="dense")(inputs=x)
        return nn.Einsum((5, 6), name="einsum")(inputs=y, einsum_str="abc,cd->abd")


class Layer(nn.Module):
    """A layer that loops run. In another program XLA may compute a ``tanh`` with other bits, a ``relu`` with the same."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.relu(nn.Dense(x.shape[-1], name="dense")(x)), None


class Stacked(nn.Module):
    """A stack of layers under a lifted transformation."""

    lift: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.lift(Layer)(name="layers")(x, None)[0]


def scan(layer, axis=0, **options):
    return nn.scan(layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3, **options)


class Ensemble(nn.Module):
    """Members that share an input."""

    target: Any = nn.Dense
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        many = nn.vmap(
            self.target,
            in_axes=None,
            out_axes=0,
            axis_size=3,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
        )
        return many(x.shape[-1], name="members")(x)


class Deep(nn.Module):
    """A scan inside of an ensemble: kernels (members, layers, in, out)."""

    features: int

    @nn.compact
    def __call__(self, x):
        return scan(Layer)(name="layers")(x, None)[0]


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(x.shape[-1], name="dense")
        return dense(jnp.sin(dense(x)))


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(5, name="dense")(nn.remat(nn.Dense)(4, name="again")(x))


class Branches(nn.Module):
    """``nn.switch`` and ``nn.cond`` over layers."""

    @nn.compact
    def __call__(self, x):
        layers = [nn.Dense(4, name=f"dense_{number}") for number in range(2)]
        if self.is_initializing():
            return sum(layer(x) for layer in layers)
        branches = [lambda module, x, each=each: each(x) for each in layers]
        picked = nn.switch((x[0, 0, 0] > 9).astype(int), branches, self, x)
        return picked + nn.cond(x[0, 0, 0] < 9, *reversed(branches), self, x)


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, kernel_init=partitioned, name="dense")(x) + Own(name="own")(x)[..., :1]


partitioned = nn.with_partitioning(nn.initializers.normal(1.0), ("x", "y"))


class BoxedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.relu(nn.Dense(x.shape[-1], kernel_init=partitioned, name="dense")(x)), None


class BoxedStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = scan(BoxedLayer, metadata_params={nn.PARTITION_NAME: "layers"})
        return stack(name="layers")(x, None)[0]


class SetUp(nn.Module):
    """A module in the style of ``setup``, with a method beside ``__call__`` and a param of its own."""

    def setup(self):
        self.first = nn.Dense(5)
        self.second = [nn.Dense(4), nn.Dense(4)]
        self.kernel = self.param("kernel", nn.initializers.normal(1.0), (4, 4))

    def __call__(self, x):
        return self.encode(x) @ self.kernel

    def encode(self, x):
        x = self.first(x)
        return self.second[0](x) + self.second[1](jnp.sin(x))


class Counted(nn.Module):
    """Batch statistics, a cache, and values that are sown."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="dense")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        total = self.variable("cache", "total", jnp.zeros, x.shape, x.dtype)
        total.value = total.value + x
        self.sow("intermediates", "sown", x * 2)
        return nn.Dense(3, name="head")(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        cells = nn.OptimizedLSTMCell(5, name="fast"), nn.LSTMCell(5, name="slow")
        ones = jnp.ones((*x.shape[:-1], 5), x.dtype)
        return [cell((ones, ones), x) for cell in cells]


class Attention(nn.Module):
    kind: Any = nn.MultiHeadDotProductAttention

    @nn.compact
    def __call__(self, x):
        return self.kind(num_heads=2, name="attention")(x)


class Tied(nn.Module):
    """A kernel that another module reads as a plain variable."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(5, name="dense")
        y = dense(x)
        return y @ dense.variables["params"]["kernel"].T


def with_state(model, variables, x):
    state = {"batch_stats": {"norm": {"mean": jnp.full(5, 0.1, x.dtype), "var": jnp.full(5, 2.0, x.dtype)}}}
    return model.apply(
        variables | state, x, mutable=["batch_stats", "cache", "intermediates"], capture_intermediates=True
    )


def encoded(model, variables, x):
    return model.apply(variables, x, method="encode")


def functions(model, variables, x):
    return model.apply(variables, x, method=lambda module, x: (module.first(x), module(x)))


def bound(model, variables, x):
    module = model.bind(variables)
    return module(x), module.encode(x), module.first(x)


def of_attention(kind):
    targets = (oriented(".*/(query|key|value)/kernel", "in_out_out"), oriented(".*/out/kernel", "in_in_out"))
    return Row(Attention(kind), targets=targets)


def of(model, orientation, x=None, **options):
    return Row(model, X if x is None else x, (oriented("(.*/)?kernel", orientation),), **options)


ROWS = {
    "Dense": Row(nn.Dense(5)),
    "JointDense": Row(JointDense(("query", "key"), (5, 2))),
    "Dense of a vector": Row(nn.Dense(5), X[0, 0]),
    "Dense without a bias": Row(nn.Dense(5, use_bias=False)),
    "subclass that calls super": Row(Rescaled(5)),
    "subclass with a product of its own": Row(Normalised(5)),
    "dot_general_cls": Row(nn.Dense(5, dot_general_cls=DotGeneral)),
    "precision": Row(nn.Dense(5, precision="highest")),
    "promote_dtype": Row(nn.Dense(5, promote_dtype=own_promotion)),
    "keyword call": Row(Keywords()),
    "DenseGeneral": of(nn.DenseGeneral((5, 2)), "in_out_out"),
    "DenseGeneral of two axes": of(nn.DenseGeneral(5, axis=(-2, -1)), "in_in_out", SPLIT),
    "DenseGeneral of axes in another order": of(nn.DenseGeneral((3, 2), axis=(-1, 1)), "in_in_out_out", SPLIT),
    "DenseGeneral with batch axes": of(nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), "stack_in_out"),
    "MultiHeadDotProductAttention": of_attention(nn.MultiHeadDotProductAttention),
    "MultiHeadAttention": of_attention(nn.MultiHeadAttention),
    "Einsum": of(nn.Einsum((2, 4, 5), "bsd,ndh->bsnh"), "out_in_out"),
    "Einsum of two axes": of(nn.Einsum((4, 6, 2), "bsnd,dhn->hbs"), "in_out_in", SPLIT),
    "Einsum with an ellipsis": of(nn.Einsum((2, 4, 5), "...d,ndh->...nh"), "out_in_out"),
    "Einsum with a batch axis in the kernel": of(nn.Einsum((3, 4, 5), "bsd,sdh->bsh"), "stack_in_out"),
    "Conv 1 x 1": of(nn.Conv(5, (1, 1)), "1_1_in_out", IMAGE),
    "Conv 1": of(nn.Conv(5, 1), "1_in_out"),
    "Conv 1 x 1 with strides": of(nn.Conv(5, (1, 1), strides=2), "1_1_in_out", IMAGE),
    "Conv 1 x 1 with padding": of(nn.Conv(5, (1, 1), padding=1), "1_1_in_out", IMAGE),
    "Conv 1 x 1 with dilated inputs": of(nn.Conv(5, (1, 1), padding=0, input_dilation=2), "1_1_in_out", IMAGE),
    "Conv 3 x 3 as a matrix": of(nn.Conv(5, (3, 3)), "in_in_in_out", IMAGE),
    "module of one's own": Row(Own()),
    "attribute called joint": Row(Named()),
    "scan": Row(Stacked(scan)),
    "scan over axis 1": of(Stacked(functools.partial(scan, axis=1)), "in_stack_out"),
    "remat in scan": Row(Stacked(lambda layer: scan(nn.remat(layer)))),
    "remat": Row(Stacked(nn.remat)),
    "ensemble": of(Ensemble(), "stack_in_out"),
    "ensemble over axis 1": of(Ensemble(axis=1), "in_stack_out"),
    "scan in an ensemble": of(Ensemble(Deep), "stack_stack_in_out"),
    "shared module": Row(Shared()),
    "nn.jit": Row(Jitted()),
    "nn.cond and nn.switch": Row(Branches()),
    "boxes": Row(Boxed()),
    "boxes in scan": Row(BoxedStack()),
    "kernel read as a variable": Row(Tied()),
    "setup": Row(SetUp()),
    "method": Row(SetUp(), call=encoded, targets=("first", "second_1")),
    "method that is a function": Row(SetUp(), call=functions),
    "bind": Row(SetUp(), call=bound),
    "collections": Row(Counted(), call=with_state),
    "mutable params": Row(SetUp(), call=lambda model, variables, x: model.apply(variables, x, mutable=["params"])[0]),
    "LSTM": Row(Recurrent()),
    "FrozenDict": Row(Shared(), change=freeze),
    "vmap of a model": Row(Shared(), call=lambda model, variables, x: jax.vmap(lambda x: model.apply(variables, x))(x[0])),
}  # fmt: skip


@functools.cache
def initialised(name: str) -> tuple[Any, dsee_jax.Adapter]:
    """Return params and a new adapter of a row, float32."""
    return created(ROWS[name])


def created(row: Row) -> tuple[Any, dsee_jax.Adapter]:
    params = row.change(jax.device_put(tiny.params(row.model, row.x)))
    config = dsee_jax.DeltaConfig(targets=row.targets, rank=2, nonzeros=5, support="random", alpha=3.0)
    return params, tiny.adapter(params, config)


def cast(leaves: Any, dtype: Any) -> Any:
    """Return arrays in another dtype, converted by NumPy: each conversion by JAX would be compiled."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf).astype(dtype)), leaves)


def run(row: Row, params: Any, dtype: Any = jnp.float32) -> Any:
    """Return the outputs of a row, computed in ``dtype``, of which the params are."""
    model = row.model.clone(dtype=dtype) if isinstance(row.model, JointDense) else row.model
    return row.call(model, {"params": params}, cast(row.x, dtype))


def attached(row: Row, params: Any, adapter: dsee_jax.Adapter | None, dtype: Any = jnp.float32) -> Any:
    with dsee_jax.attached(adapter):
        return run(row, params, dtype)


def grown(adapter: dsee_jax.Adapter) -> Any:
    """Return deltas with random values, of the widest dtype."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jax.device_put(0.3 * draw.normal(size=leaf.shape)), adapter.deltas)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance), actual, expected)


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ROWS)
def test_attached_equals_materialised(name):
    """An update of zero changes no bit, eager or jitted. Other updates, in float64: outputs, gradients, jitted and eager."""
    row, (params, adapter) = ROWS[name], initialised(name)
    if "scan" not in name:
        # Without LLVM's optimisations (conftest), equal products in two loops may differ in float32.
        assert_equal(attached(row, params, adapter), run(row, params))
    eager = attached(row, params, adapter.replace(deltas=grown(adapter)))
    with jax.enable_x64(True):

        def with_gradients(call):
            def loss(deltas):
                outputs = call(adapter.replace(deltas=deltas))
                return sum(jnp.sum(jnp.sin(leaf + n)) for n, leaf in enumerate(jax.tree.leaves(outputs))), outputs

            return jax.jit(jax.grad(loss, has_aux=True))

        params64, new = cast(params, jnp.float64), cast(adapter.deltas, jnp.float64)
        attach = with_gradients(lambda adapter: attached(row, params64, adapter, jnp.float64))
        reference = with_gradients(lambda adapter: run(row, dsee_jax.materialize(params64, adapter), jnp.float64))
        assert_equal(attach(new)[1], reference(new)[1])
        (gradients, outputs), (references, expected) = attach(grown(adapter)), reference(grown(adapter))
        assert_close(outputs, expected, 1e-10)
        assert_close(gradients, references, 1e-10)
        assert_close(eager, outputs, 1e-3)
        assert all(np.max(np.abs(gradient)) > 1e-6 for gradient in jax.tree.leaves(gradients))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    "name", ["Dense", "JointDense", "precision", "DenseGeneral", "Einsum", "Conv 1 x 1", "module of one's own"]
)
def test_an_update_of_zero_changes_no_bit_in_any_precision(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        row, (params, adapter) = ROWS[name], initialised(name)
        params = cast(params, dtype)
        outputs, expected = attached(row, params, adapter, dtype), run(row, params, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
        assert_equal(outputs, expected)
        jitted = jax.jit(functools.partial(attached, row, dtype=dtype))(params, adapter)
        assert_equal(jitted, jax.jit(functools.partial(run, row, dtype=dtype))(params))


def rounded(x):
    """Return ``x`` on a grid, with the gradient of ``x``."""
    return x + jax.lax.stop_gradient(jnp.round(x * 8) / 8 - x)


def quantised(x, w, dimensions, precision=None, preferred_element_type=None):
    return jax.lax.dot_general(rounded(x), rounded(w), dimensions, precision, preferred_element_type)


@pytest.mark.parametrize("options", [{"dot_general": quantised}, {"dot_general_cls": lambda: quantised}])
def test_a_quantised_product_stays_and_the_update_is_not_quantised(options):
    row = Row(nn.Dense(5, **options))
    params, adapter = created(row)
    plain = run(row, params)
    assert_equal(attached(row, params, adapter), plain)
    adapter = adapter.replace(deltas=grown(adapter))
    update = dsee_jax.materialize(jax.tree.map(jnp.zeros_like, params), adapter)["kernel"]
    np.testing.assert_allclose(attached(row, params, adapter), plain + X @ update, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(plain - nn.Dense(5).apply({"params": params}, X))) > 0.01


def test_a_product_keeps_its_precision():
    row, (params, adapter) = ROWS["precision"], initialised("precision")
    jaxpr = jax.make_jaxpr(functools.partial(attached, row))(params, adapter).jaxpr
    products = [each.params["precision"] for each in compiled.equations(jaxpr) if each.invars[-1].aval.shape == (4, 5)]
    assert products == [(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)]


WIDE = {
    "Dense": of(nn.Dense(64), "in_out"),
    "subclass": of(Rescaled(64), "in_out"),
    "dot_general": of(nn.Dense(64, dot_general=quantised), "in_out"),
    "DenseGeneral": of(nn.DenseGeneral((8, 8)), "in_out_out"),
    "Einsum": of(nn.Einsum((8, 64, 8), "bsd,ndh->bsnh"), "out_in_out"),
    "Conv": of(nn.Conv(64, 1), "1_in_out"),
    "JointDense": Row(JointDense(("query", "key"), (64, 64))),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_linear_module_forms_no_gradient_of_the_size_of_its_kernel(name):
    row = dataclasses.replace(WIDE[name], x=normal(1, 2, 64))
    params, adapter = created(row)

    def loss(deltas):
        outputs = attached(row, params, adapter.replace(deltas=deltas))
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(grown(adapter)).jaxpr
    large = [
        (each.primitive, each.outvars) for each in compiled.equations(jaxpr) if each.outvars[0].aval.size >= 64 * 64
    ]
    # The quantised product rounds its kernel in the forward pass.
    assert not large or name == "dot_general", large
