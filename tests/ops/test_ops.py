"""The operations with gradient rules against autodiff of plain formulas, in float64."""

import functools

import flax.linen
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from dsee_jax.errors import InputError
from dsee_jax.ops import dense, nn
from dsee_jax.ops.barrier import fusion_barrier


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random(seed, *shape):
    """Return an array; JAX would compile a program of its own for each conversion of each shape."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape))


def ones(*shape):
    return jax.device_put(np.ones(shape, np.float32))


PLACES = np.array([[0, 1], [3, 2], [3, 2], [9, 4]], np.int32)


def problem(leading, width=10, outputs=(6, 7, 5), kinds=("ab+values", "", "values")):
    """Return x, and per member the kernel, bias (None for the second), delta and support, with one repeated coordinate."""
    x = random(0, *leading, width)
    kernels, biases, deltas, supports = [], [], [], []
    for number, (out, kind) in enumerate(zip(outputs, kinds, strict=True)):
        kernels.append(random(10 + number, width, out))
        biases.append(None if number == 1 else random(20 + number, out))
        delta = {}
        if "ab" in kind:
            delta |= {"a": random(30 + number, width, 2), "b": random(40 + number, 2, out)}
        if "values" in kind:
            delta |= {"values": random(50 + number, 4)}
        deltas.append(delta)
        supports.append(PLACES if "values" in kind else None)
    return x, tuple(kernels), tuple(biases), tuple(deltas), tuple(supports)


def plain(x, kernels, biases, deltas, supports, *, scale, scale_sparse=True):
    """Return `joint_dense` by materialised kernels."""
    outputs = []
    for kernel, bias, delta, support in zip(kernels, biases, deltas, supports, strict=True):
        if "a" in delta:
            kernel = kernel + scale * delta["a"] @ delta["b"]
        if "values" in delta:
            kernel = kernel.at[tuple(support.T)].add((scale if scale_sparse else 1.0) * delta["values"])
        outputs.append(x @ kernel + (0.0 if bias is None else bias.reshape((1,) * (x.ndim - 1) + (-1,))))
    return tuple(outputs)


def close(actual, expected, tolerance=1e-11):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), actual, expected)


def weighed(function, supports, **options):
    """Return a scalar function that depends on every output entry differently."""

    def loss(x, kernels, biases, deltas):
        outputs = function(x, kernels, biases, deltas, supports, **options)
        return sum(jnp.sum(jnp.sin(y) * (number + 1)) for number, y in enumerate(outputs))

    return loss


# Two rows are too few to fold, the others fold.
@pytest.mark.parametrize(
    ("leading", "scale_sparse"), [((2,), True), ((2, 1), False), ((40,), False), ((8, 5), True), ((2, 3, 7), True)]
)
@pytest.mark.usefixtures("x64")
def test_joint_dense_and_every_gradient_equal_the_materialised_form(leading, scale_sparse):
    *arguments, supports = problem(leading)
    options = {"scale": 1.7, "scale_sparse": scale_sparse}

    def both(function):
        gradient = jax.grad(weighed(function, supports, **options), argnums=(0, 1, 2, 3))
        return jax.jit(lambda *a: (function(*a, supports, **options), gradient(*a)))(*arguments)

    close(both(dense.joint_dense), both(plain))


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
@pytest.mark.usefixtures("x64")
def test_each_gradient_alone_is_right(argument):
    """Gradients of other arguments are not computed; the wanted gradient must not be lost with them."""
    *arguments, supports = problem((8, 5))
    actual, expected = (
        jax.jit(jax.grad(weighed(function, supports, scale=2.0), argnums=argument))(*arguments)
        for function in (dense.joint_dense, plain)
    )
    close(actual, expected)


@pytest.mark.usefixtures("x64")
def test_unused_output_gives_no_gradient():
    x, kernels, biases, deltas, supports = problem((40,))

    def loss(function, deltas):
        return jnp.sum(function(x, kernels, biases, deltas, supports, scale=2.0)[2] ** 2)

    close(*(jax.jit(jax.grad(functools.partial(loss, function)))(deltas) for function in (dense.joint_dense, plain)))


@pytest.mark.parametrize("leading", [(2,), (40,)])
@pytest.mark.usefixtures("x64")
def test_dense_under_vmap_scan_and_remat(leading):
    """Stacked layers: vmap over kernels, scan over layers, with and without remat."""
    layers, width = 3, 10
    x, w, bias = random(0, *leading, width), random(1, layers, width, width), random(2, layers, width)
    w = np.asarray(w) / 4
    delta = {"a": random(3, layers, width, 2), "b": random(4, layers, 2, width), "values": random(5, layers, 4)}
    support = np.tile(np.array([[0, 1], [3, 2], [5, 5], [9, 4]], np.int32), (layers, 1, 1))

    def through(wrap, dense, x, w, bias, delta):
        def body(x, layer):
            return jnp.tanh(dense(x, *layer, scale=0.5)), None

        return jnp.sum(jax.lax.scan(wrap(body), x, (w, bias, delta, support))[0] ** 2)

    def mapped(dense, x, w, bias, delta):
        return jnp.sum(jnp.sin(jax.vmap(lambda *layer: dense(x, *layer, scale=0.5))(w, bias, delta, support)))

    def plain_dense(x, kernel, bias, delta, support, *, scale):
        return plain(x, (kernel,), (bias,), (delta,), (support,), scale=scale)[0]

    def gradient(function, dense, argnums):
        return jax.jit(jax.grad(functools.partial(function, dense), argnums))(x, w, bias, delta)

    for function, argnums in (
        (functools.partial(through, lambda f: f), 3),
        (functools.partial(through, jax.checkpoint), (0, 1, 2, 3)),
        (mapped, (0, 1, 2, 3)),
    ):
        close(gradient(function, dense.dense, argnums), gradient(function, plain_dense, argnums))


@pytest.mark.parametrize("leading", [(2,), (8, 5)])
@pytest.mark.usefixtures("x64")
def test_forward_mode_equals_the_materialised_form(leading):
    *arguments, supports = problem(leading)
    tangents = jax.tree.map(np.cos, arguments)

    def of(function):
        return lambda *a: function(*a[:-1], supports, scale=a[-1])

    primals, tangents = (*arguments, np.asarray(1.7)), (*tangents, np.asarray(0.3))
    forward = jax.jit(lambda function, *a: jax.jvp(of(function), *a), static_argnums=0)
    expected = forward(plain, primals, tangents)
    close(forward(dense.joint_dense, primals, tangents), expected)
    y, linear = jax.jit(lambda *a: jax.linearize(of(dense.joint_dense), *a))(*primals)
    close((y, jax.jit(lambda linear, *a: linear(*a))(linear, *tangents)), expected)


def loss_of_one_member(rows):
    """Return a loss (function, flat) and a point."""
    *arguments, supports = problem((rows,), outputs=(6,), kinds=("ab+values",))
    flat, restore = jax.flatten_util.ravel_pytree((arguments, 1.7))

    def loss(function, flat):
        arguments, scale = restore(flat)
        return weighed(function, supports, scale=scale)(*arguments)

    return loss, flat


@functools.cache
def plain_hessian(rows):
    loss, flat = loss_of_one_member(rows)
    return jax.jit(jax.hessian(functools.partial(loss, plain)))(flat)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("rows", [2, 8])  # too few to fold; enough to fold
@pytest.mark.usefixtures("x64")
def test_hessian_in_every_mode_equals_the_materialised_form(outer, inner, rows):
    loss, flat = loss_of_one_member(rows)
    close(jax.jit(outer(inner(functools.partial(loss, dense.joint_dense))))(flat), plain_hessian(rows))


@pytest.mark.parametrize("scale_sparse", [True, False])
@pytest.mark.usefixtures("x64")
def test_scale_may_be_traced_and_differentiated(scale_sparse):
    *arguments, supports = problem((2,) if scale_sparse else (40,))

    def loss(function, scale):
        return weighed(function, supports, scale=scale, scale_sparse=scale_sparse)(*arguments)

    close(*(jax.jit(jax.value_and_grad(functools.partial(loss, f)))(1.7) for f in (dense.joint_dense, plain)))


@pytest.mark.parametrize("leading", [(2,), (40,)])
@pytest.mark.usefixtures("x64")
def test_many_adapters_of_one_kernel_by_vmap(leading):
    x, kernels, biases, deltas, supports = problem(leading)
    scales = np.array([0.5, 1.0, 2.0])
    deltas, supports = jax.tree.map(np.asarray, (deltas, supports))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, 3 * leaf]), deltas)
    moved = jax.tree.map(lambda leaf: np.stack([leaf, leaf, (leaf + 1) % 5]), supports)

    def gradient(function):
        def of_one(deltas, supports, scale):
            return weighed(function, supports, scale=scale)(x, kernels, biases, deltas)

        return jax.jit(jax.vmap(jax.value_and_grad(of_one, (0, 2))))(stacked, moved, scales)

    close(gradient(dense.joint_dense), gradient(plain))


def products(function, *arguments):
    """Return the sorted result shapes of all matrix products in the jaxpr and its inner jaxprs."""
    equations = compiled.equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return [tuple(sorted(each.outvars[0].aval.shape)) for each in equations if each.primitive.name == "dot_general"]


def backward(function, *arguments):
    """Return the backward pass of a function, with the shapes of what it keeps in place of the arrays."""
    return jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments)


def call(function, *arguments):
    return function(*arguments)


@pytest.mark.parametrize("rows", [3, 64])
def test_backward_forms_no_gradient_of_a_frozen_kernel(rows):
    """Tuning costs two large products instead of three; training the kernel needs the third."""
    x, w = ones(rows, 20), ones(20, 30)
    delta, support = {"a": ones(20, 2), "b": ones(2, 30), "values": ones(4)}, np.zeros((4, 2), np.int32)

    def loss(x, w, delta):
        return jnp.sum(dense.dense(x, w, None, delta, support, scale=1.0) ** 2)

    tuning = backward(lambda x, delta: loss(x, w, delta), x, delta)
    training = backward(loss, x, w, delta)
    folded = 1 if rows == 64 else 0  # A @ B, added to the kernel again
    assert products(call, tuning, ones()).count((20, 30)) == folded
    assert products(call, training, ones()).count((20, 30)) == folded + 1


@pytest.mark.parametrize("rows", [3, 64])
def test_backward_keeps_only_the_arguments(rows):
    """Neither the folded kernel nor ``x @ A`` nor the gathered entries of x are kept for the backward pass."""
    x, w, delta = ones(rows, 20), ones(20, 30), {"a": ones(20, 2), "b": ones(2, 30)}
    delta["values"], support = ones(4), np.zeros((4, 2), np.int32)
    allowed = [leaf.shape for leaf in (x, w, *delta.values(), support, ones())]
    passed = backward(lambda x, delta: dense.dense(x, w, None, delta, support, scale=1.0), x, delta)
    kept = [leaf.shape for leaf in jax.tree.leaves(passed)]
    assert set(kept) <= set(allowed)
    assert kept.count((20, 30)) == 1


def test_gradient_of_x_is_one_product_of_the_joined_kernels():
    *arguments, supports = problem((40,))
    function = functools.partial(dense.joint_dense, supports=supports, scale=1.0)
    x, *others = arguments
    shapes = products(call, backward(lambda x: function(x, *others), x), jax.eval_shape(function, *arguments))
    assert [shape for shape in shapes if 40 in shape] == [(10, 40)]


@pytest.mark.parametrize(("devices", "thin"), [(1, (2, 40)), (8, (2, 5, 8))])
def test_thin_products_join_the_rows_of_one_device_only(monkeypatch, devices, thin):
    """Joined rows save a transposed copy of the cotangent; on a mesh they would gather a sharded sequence."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    *arguments, deltas, supports = problem((8, 5))
    loss = weighed(dense.joint_dense, supports, scale=1.0)
    assert {shape for shape in products(jax.grad(lambda deltas: loss(*arguments, deltas)), deltas) if 2 in shape} == {
        thin,
        (2, 6),
        (2, 10),
    }


def test_small_update_is_not_lost_in_bfloat16():
    """An update of 2**-10, added to a bfloat16 kernel of ones, would round to zero."""
    x = jax.device_put(np.ones((257, 64), jnp.bfloat16))
    delta = {"a": jax.device_put(np.full((64, 1), 2.0**-10, np.float32)), "b": ones(1, 32)}
    kernel = jax.device_put(np.tile(np.array([[1.0], [-1.0]], np.float32), (32, 32)))
    y = dense.dense(x, kernel, None, delta, None, scale=1.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 64 * 2.0**-10)
    gradient = jax.grad(
        lambda delta: jnp.sum(dense.dense(x, kernel, None, delta, None, scale=1.0).astype(jnp.float32))
    )(delta)
    assert gradient["a"].dtype == jnp.float32
    np.testing.assert_array_equal(gradient["a"], 257 * 32)  # 8224 is no bfloat16: the sum is float32


def test_every_gradient_is_computed_where_jax_promotes_no_dtype():
    shapes = [(9, 6), (6, 5), (5,)]
    x, w, bias = (np.asarray(random(number, *shape)).astype(jnp.bfloat16) for number, shape in enumerate(shapes))
    delta, support = (
        {"a": random(3, 6, 2), "b": random(4, 2, 5), "values": random(5, 2)},
        np.array([[0, 1], [5, 4]], np.int32),
    )
    run = lambda *args: dense.dense(*args, support, scale=2.0).astype(jnp.float32).sum()
    with jax.numpy_dtype_promotion("strict"):
        gradients = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))(x, w, bias, delta)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.usefixtures("x64")
def test_zero_update_has_the_bits_of_flax_dense(rows, dtype):
    """In 16 bits, Dense rounds the product before it adds the bias."""
    shapes = [(rows, 20), (20, 30), (30,)]
    x, w, bias = (
        jax.device_put(np.asarray(random(number, *shape)).astype(dtype)) for number, shape in enumerate(shapes)
    )
    delta = jax.device_put({"a": random(3, 20, 4), "b": np.zeros((4, 30)), "values": np.zeros(2)})
    support = jax.device_put(np.array([[0, 1], [19, 29]], np.int32))

    def expected(x, w, bias):
        params = {"kernel": w} | ({} if bias is None else {"bias": bias})
        return flax.linen.Dense(30, use_bias=bias is not None, dtype=dtype).apply({"params": params}, x)

    def updated(x, w, bias):
        return dense.dense(x, w, bias, delta, support, scale=2.0)

    np.testing.assert_array_equal(updated(x, w, bias), expected(x, w, bias))
    for optional in (bias, None):
        np.testing.assert_array_equal(jax.jit(updated)(x, w, optional), jax.jit(expected)(x, w, optional))


@pytest.mark.parametrize("kind", ["ab", "values", "ab+values", ""])
@pytest.mark.usefixtures("x64")
def test_output_of_an_update_alone(kind):
    """Equal to the map with a kernel of zeros, with all gradients; no array has the size of a kernel."""
    x, kernels, _, deltas, supports = problem((4, 5), outputs=(6,), kinds=(kind,))

    def alone(x, deltas, scale):
        return jnp.sum(jnp.sin(dense.update(x, deltas[0], supports[0], features=6, scale=scale)))

    def reference(x, deltas, scale):
        return jnp.sum(jnp.sin(plain(x, (jnp.zeros_like(kernels[0]),), (None,), deltas, supports, scale=scale)[0]))

    gradient = jax.jit(jax.value_and_grad(alone, (0, 1, 2)))
    close(gradient(x, deltas, 1.7), jax.jit(jax.value_and_grad(reference, (0, 1, 2)))(x, deltas, 1.7))
    assert "[10,6]" not in str(jax.make_jaxpr(gradient)(x, deltas, 1.7)).replace("[6,10]", "[10,6]")


def test_output_of_an_update_alone_is_float32_in_bfloat16():
    x, delta = np.ones((3, 4), jnp.bfloat16), {"values": np.array([1 + 2.0**-12], np.float32)}
    x, delta, support = jax.device_put((x, delta, np.array([[1, 2]], np.int32)))
    y = dense.update(x, delta, support, features=3, scale=1.0, scale_sparse=False)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y[0], [0, 0, 1 + 2.0**-12])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": (1, 2)}, r"'a' of shape \(1, 2\).*needs \(6, 2\)"),
        ({"a": (5, 2)}, r"'a' of shape \(5, 2\).*needs \(6, 2\)"),
        ({"b": (2, 1)}, r"'b' of shape \(2, 1\).*needs \(2, 5\)"),
        ({"b": (3, 5)}, r"'b' of shape \(3, 5\).*needs \(2, 5\)"),
        ({"b": None}, "'a' and no 'b'"),
        ({"a": None}, "'b' and no 'a'"),
        ({"values": (1,)}, r"'support' of shape \(3, 2\).*needs \(1, 2\)"),
        ({"values": ()}, r"'support' of shape \(3, 2\).*needs \(2,\)"),
        ({"support": (3,)}, r"'support' of shape \(3,\).*needs \(3, 2\)"),
        ({"support": (3, 3)}, r"'support' of shape \(3, 3\).*needs \(3, 2\)"),
        ({"support": None}, "no coordinates: pass the supports"),
        ({"c": (3,)}, "unknown array 'c'"),
    ],
)
def test_misshapen_update_is_refused(changes, message):
    """Each of the arrays would broadcast or fail deep inside of the product."""
    shapes = {"a": (6, 2), "b": (2, 5), "values": (3,), "support": (3, 2)} | changes
    delta = {name: np.zeros(shape, np.int32) for name, shape in shapes.items() if shape is not None}
    support = delta.pop("support", None)
    with pytest.raises(InputError, match=message):
        dense.dense(ones(2, 6), ones(6, 5), None, delta, support, scale=1.0)
    with pytest.raises(InputError, match="update of x/kernel"):
        dense.check("x/kernel", (6, 5), delta, support)


def test_coordinates_that_are_no_whole_numbers_are_refused():
    with pytest.raises(InputError, match="'support' of dtype float32; expected whole numbers: int32"):
        dense.check("x/kernel", (6, 5), {"values": np.zeros(3)}, np.zeros((3, 2), np.float32))


def test_stacked_update_is_checked_with_its_stack():
    delta = {"a": np.zeros((4, 6, 2)), "b": np.zeros((4, 2, 5)), "values": np.zeros((4, 3))}
    dense.check("layers/kernel", (4, 6, 5), delta, np.zeros((4, 3, 2), int))
    with pytest.raises(InputError, match=r"'support' of shape \(3, 2\).*needs \(4, 3, 2\)"):
        dense.check("layers/kernel", (4, 6, 5), delta, np.zeros((3, 2), int))


def plain_norm(x, scale, bias):
    return jax.nn.standardize(x, axis=-1, epsilon=1e-6) * scale.reshape(1, 1, -1) + bias.reshape(1, 1, -1)


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale.reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("function", "plain", "shapes"),
    [
        (nn.gelu, functools.partial(jax.nn.gelu, approximate=False), [(3, 50)]),
        (nn.gelu_tanh, functools.partial(jax.nn.gelu, approximate=True), [(3, 50)]),
        (nn.silu, lambda x: x / (1 + jnp.exp(-x)), [(3, 50)]),
        (lambda x, s: nn.rms_norm(x, s, 1e-6), plain_rms_norm, [(2, 3, 8), (8,)]),
        (lambda x, s, b: nn.layer_norm(x, s, b, 1e-6), plain_norm, [(2, 3, 8), (8,), (8,)]),
        (nn.softmax, lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True), [(2, 3, 8)]),
        (jax.vmap(fusion_barrier), jnp.array, [(2, 3, 8)]),
    ],
    ids=["gelu", "gelu_tanh", "silu", "rms_norm", "layer_norm", "softmax", "fusion_barrier"],
)
@pytest.mark.usefixtures("x64")
def test_values_and_gradients_equal_plain_autodiff(function, plain, shapes):
    draw = lambda first, factor: [
        jax.device_put(factor * np.asarray(random(first + number, *shape))) for number, shape in enumerate(shapes)
    ]
    arguments, tangents = draw(0, 3), draw(9, 1)

    def everything(f):
        """Return the values, the gradients of the first argument and of all, and the derivatives along the tangents."""
        gradient = lambda argnums: jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)) * f(*a)), argnums)
        gradients = gradient(0), gradient(tuple(range(len(shapes))))
        return jax.jit(lambda a, tangents: (f(*a), *(each(*a) for each in gradients), jax.jvp(f, a, tangents)))

    close(*(everything(f)(arguments, tangents) for f in (function, plain)))


@pytest.mark.parametrize("activation", [nn.gelu, nn.gelu_tanh, nn.silu], ids=["gelu", "gelu_tanh", "silu"])
def test_activations_save_their_input_alone(activation):
    """Of the width of the neurons, each array that a layer saves is its largest."""
    x = random(0, 3, 50)
    saved = [leaf for leaf in jax.tree.leaves(jax.jit(lambda x: jax.vjp(activation, x)[1])(x)) if leaf.size > 1]
    assert [leaf.shape for leaf in saved] == [x.shape]
    np.testing.assert_array_equal(saved[0], x)


def test_layer_norm_statistics_of_bfloat16_are_float32():
    x = jax.device_put((1000 + np.arange(64.0)).astype(jnp.bfloat16)[None])
    y = nn.layer_norm(x, ones(64), jax.device_put(np.zeros(64, np.float32)), 0.0)
    assert y.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(y, (exact - exact.mean()) / exact.std(), atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_unbiased_and_independent(rate):
    """The rate, and the correlations with neighbours and other keys, are within four standard errors."""
    shape, key = (500, 800), jax.random.key(3)
    dropped = jax.jit(lambda x, key: nn.dropout(x, rate, key=key))
    masks = np.stack(
        [np.asarray(dropped(np.ones(shape, np.float32), jax.random.fold_in(key, n))) > 0 for n in range(3)]
    )
    count = masks[0].size
    bound = 4 * np.sqrt(rate * (1 - rate) / count)
    centred = masks - (1 - rate)
    for number, one in enumerate(centred):
        assert abs(one.mean()) < bound
        assert np.abs(one.mean(0)).max() < 5.5 * np.sqrt(rate * (1 - rate) / shape[0])
        assert np.abs(one.mean(1)).max() < 5.5 * np.sqrt(rate * (1 - rate) / shape[1])
        pairs = [one[:, 1:] * one[:, :-1], one[1:] * one[:-1], one[:, 2:] * one[:, :-2], one * centred[number - 1]]
        for pair in pairs:
            assert abs(pair.mean()) < 4 * rate * (1 - rate) / np.sqrt(pair.size)
    y = dropped(np.full(shape, 2.0, np.float32), key)
    np.testing.assert_allclose(np.unique(y), [0.0, 2.0 / (1 - rate)], rtol=1e-6)


def test_hash_bits_are_uniform():
    """Chi-square of the top and bottom bytes over 2**20 draws: 255 degrees of freedom, standard deviation 22.6."""
    both = jax.jit(lambda key: (nn._hash_bits(key, (1 << 20,)), nn._hash_bits(key, (1 << 10, 1 << 10))))
    bits, square = map(np.asarray, both(jax.random.key(1)))
    for byte in (bits >> 24, bits & 255):
        counts = np.bincount(byte, minlength=256)
        assert abs(((counts - 4096) ** 2 / 4096).sum() - 255) < 4 * 22.6
    assert np.array_equal(bits, square.ravel())


def test_dropout_gradient_is_the_mask():
    x, drop = np.ones((3, 40), np.float32), lambda x, key: nn.dropout(x, 0.3, key=key)

    @jax.jit
    def run(x):
        keys = jax.random.split(jax.random.key(0), 3)
        gradient = jax.grad(lambda x: jnp.sum(drop(x, keys[1])))(x[1])
        return jax.vmap(drop)(x, keys), gradient, nn.dropout(x, 0.0, key=keys[0])

    y, gradient, kept = map(np.asarray, run(x))
    assert len(np.unique(y, axis=0)) == 3
    np.testing.assert_array_equal(gradient, y[1])
    np.testing.assert_array_equal(kept, x)
