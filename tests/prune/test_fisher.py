"""The squared gradients at the outputs of kernels equal those by hand, and decide what goes of each kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax
import tiny
from dsee_jax import prune, tree
from dsee_jax.errors import InputError
from dsee_jax.models import INPUTS
from dsee_jax.ops.joint import JointDense
from dsee_jax.prune import fisher, reconstruction
from dsee_jax.train.losses import cross_entropy
from examples import case


def normal(*shape):
    return jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32))


class Twice(nn.Module):
    """A linear module that is called twice, with a function of all positions of an example between."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(5, name="dense")
        y = dense(x)
        return dense(jnp.tanh(y + y.mean(axis=1, keepdims=True)))


def test_squares_are_those_of_examples_and_positions_at_each_call():
    """Written out with the two outputs as variables: the gradient of each example's loss at each position."""
    x = normal(3, 4, 5)
    params = jax.device_put(tiny.params(Twice(), x))

    def losses(params, x):
        return jnp.sum(Twice().apply({"params": params}, x) ** 3, axis=-1)

    def vmapped(params, x):
        return jax.vmap(lambda row: losses(params, row[None]))(x)

    jitted = jax.jit(losses)
    jitted(params, x)  # its cached program has no sinks
    kernel, bias = params["dense"]["kernel"], params["dense"]["bias"]

    def loss(first, second, x):
        y = x @ kernel + bias[None] + first
        return jnp.sum((jnp.tanh(y + y.mean(axis=0, keepdims=True)) @ kernel + bias[None] + second) ** 3)

    expected, gradients, zeros = np.zeros(5), jax.jit(jax.grad(loss, argnums=(0, 1))), np.zeros((4, 5), np.float32)
    for example in np.asarray(x):
        for gradient in gradients(zeros, zeros, example):
            expected += np.square(np.asarray(gradient, np.float64)).sum(0)
    for each in (losses, jitted, vmapped, jax.remat(losses)):
        found = fisher.outputs(each, params, ["dense/kernel"], [x])
        assert found.keys() == {"dense/kernel"}
        np.testing.assert_allclose(found["dense/kernel"], expected, rtol=2e-5)


class Doubled(nn.Dense):
    """A linear module whose method calls that of its parent."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_outputs_of_a_subclass_count_once():
    x = normal(3, 5)
    params = jax.device_put(tiny.params(Doubled(4), x))
    found = fisher.outputs(lambda params, x: Doubled(4).apply({"params": params}, x) ** 2, params, ["kernel"], [x])
    x, params = np.asarray(x), jax.tree.map(np.asarray, params)
    expected = np.square(2 * 2 * (x @ params["kernel"] + params["bias"][None])).sum(0)
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_outputs_of_a_joint_module_are_in_their_order(dtype):
    """One position: the gradient at an output is that of its bias."""
    model = JointDense(("query", "key", "value"), (4, 4, 4), dtype=dtype)
    x = normal(1, 1, 5)
    params = jax.device_put(tiny.params(model, x))

    def losses(params, x):
        outputs = model.apply({"params": params}, x)
        return sum(weight * jnp.sum(y.astype(jnp.float32) ** 2) for weight, y in enumerate(outputs, 1))

    found = fisher.outputs(losses, params, [f"{name}/kernel" for name in params], [x])
    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(losses))(params, x))
    for name in params:
        assert found[f"{name}/kernel"].dtype == jnp.float32
        np.testing.assert_allclose(found[f"{name}/kernel"], np.square(gradient[name]["bias"]), rtol=1e-2, err_msg=name)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A model with a classifier that is not 0, a batch, and its losses."""
    model, params, batch = case(tmp_path_factory.mktemp("fisher") / "hf", layers=2)
    kernel = jax.random.normal(jax.random.key(0), params["classifier"]["kernel"].shape)
    params = tree.replace(params, {"classifier/kernel": kernel})
    batch |= {"labels": np.array([0, 1, 1, 0])}

    def losses(params, batch):
        outputs = model.apply({"params": params}, **{name: batch[name] for name in INPUTS}, deterministic=True)
        return cross_entropy(outputs, batch) * batch["weights"]

    return model, params, batch, losses


def test_squares_do_not_depend_on_batches_and_filler_rows_count_nothing(encoder):
    _, params, batch, losses = encoder
    rows = len(batch["labels"])
    paths = [path for path in tree.flatten(params) if path.endswith("/kernel")]
    single = [{name: each[i : i + 1] for name, each in batch.items()} for i in range(rows)]
    whole, apart = (fisher.outputs(losses, params, paths, batches) for batches in ([batch], single))
    filled = {name: np.concatenate([each, each]) for name, each in batch.items()}
    filled["weights"][rows:] = 0
    padded = fisher.outputs(losses, params, paths, [filled])
    assert whole.keys() == {*paths}
    for path, square in whole.items():
        assert square.shape == (tree.get(params, path).shape[1],)
        assert np.all(np.asarray(square) >= 0)
        assert np.any(np.asarray(square) > 0)
        np.testing.assert_allclose(apart[path], square, rtol=1e-4, atol=1e-9, err_msg=path)
        np.testing.assert_allclose(padded[path], square, rtol=1e-4, atol=1e-9, err_msg=path)


def drawn():
    """Kernels of unequal shapes, one stacked, with the statistics of their inputs and outputs."""
    random = np.random.default_rng(0)
    shapes = {"a": (24, 9), "b": (13, 30), "layers/c": (2, 10, 7)}
    kernels = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    means = {path: random.random(w.shape[:-1]).astype(np.float32) for path, w in kernels.items()}
    squares = {path: random.random((*w.shape[:-2], w.shape[-1])).astype(np.float32) for path, w in kernels.items()}
    return kernels, means, squares


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_lowest_entries_of_all_kernels_are_counted_by_block(sparsity):
    kernels, means, squares = drawn()
    found = fisher.lowest(kernels, means, squares, sparsity=sparsity, block=10)
    rises = {
        path: np.float64(w) ** 2 * np.float64(means[path])[..., None] * np.float64(squares[path])[..., None, :]
        for path, w in kernels.items()
    }
    every = np.sort(np.concatenate([rise.ravel() for rise in rises.values()]))
    gone = round(sparsity * len(every))
    assert sum(count.sum() for count in found.values()) == gone
    assert {path: count.shape for path, count in found.items()} == {"a": (3,), "b": (2,), "layers/c": (2, 1)}
    bound = every[gone - 1] if gone else -1
    for path, rise in rises.items():
        inputs = rise.shape[-2]
        blocks = [(rise[..., at : at + 10, :] <= bound).sum((-2, -1)) for at in range(0, inputs, 10)]
        np.testing.assert_array_equal(found[path], np.stack(blocks, axis=-1), err_msg=path)


def test_kernels_compete_by_what_the_loss_feels():
    """The loss is quadratic and known: ``sum of q_o D_o^T H D_o`` of all kernels rises less than if each is pruned alike."""
    random = np.random.default_rng(0)
    params, grams, squares = {}, {}, {}
    for number, size in enumerate((1.0, 0.1, 0.01)):
        x = random.normal(size=(200, 30)) @ (np.eye(30) + 0.4 * random.normal(size=(30, 30)))
        params[f"k{number}"] = jax.device_put(random.normal(size=(30, 20)))
        grams[f"k{number}"] = jax.device_put(x.T @ x / 200)
        squares[f"k{number}"] = jax.device_put(size * random.gamma(0.5, size=20))

    def rise(new):
        total = 0.0
        for path, w in params.items():
            change = np.asarray(new[path], np.float64) - np.asarray(w, np.float64)
            total += np.sum(np.asarray(squares[path]) * np.einsum("io,ij,jo->o", change, grams[path], change))
        return total

    masks, new = prune.sparsegpt(params, None, ["k."], grams=grams, squares=squares, sparsity=0.6)
    _, alike = prune.sparsegpt(params, None, ["k."], grams=grams, sparsity=0.6)
    zeros = {path: int((~np.asarray(mask)).sum()) for path, mask in masks.items()}
    assert sum(zeros.values()) == round(0.6 * 3 * 600)
    assert zeros["k0"] < zeros["k1"] < zeros["k2"]
    assert all((np.asarray(new[path])[~np.asarray(mask)] == 0).all() for path, mask in masks.items())
    assert rise(new) < 0.2 * rise(alike)
    # The products of small weights and small squares underflow in float32.
    scale = lambda factor, arrays: jax.tree.map(lambda each: np.float32(factor) * np.asarray(each), arrays)
    small, low = scale(1e-12, params), scale(1e-18, squares)
    scaled, _ = prune.sparsegpt(small, None, ["k."], grams=grams, squares=low, sparsity=0.6)
    assert all(np.array_equal(scaled[path], mask) for path, mask in masks.items())
    # The outputs that the loss feels least lose most, and a rule with a sparsity of its own does not compete.
    for path, mask in masks.items():
        kept, felt = np.asarray(mask).sum(0), np.asarray(squares[path])
        assert kept[np.argsort(felt)[:5]].sum() < kept[np.argsort(felt)[-5:]].sum()
    own, _ = prune.sparsegpt(
        params, None, [("k0", {"sparsity": 0.25}), "k."], grams=grams, squares=squares, sparsity=0.6
    )
    assert (~np.asarray(own["k0"])).sum() == 150
    assert sum((~np.asarray(own[path])).sum() for path in ("k1", "k2")) == 720
    rules = [("k0", {"n": 1, "m": 3}), "k."]
    groups, _ = prune.sparsegpt(params, None, rules, grams=grams, squares=squares, sparsity=0.6)
    assert (np.asarray(groups["k0"]).reshape(10, 3, 20).sum(1) == 1).all()
    assert sum((~np.asarray(groups[path])).sum() for path in ("k1", "k2")) == 720


def test_stacks_and_other_orientations_lose_what_their_matrices_lose():
    """Kernels of more than one block of inputs: a stack, and its transposed layers, equal its layers."""
    random = np.random.default_rng(2)
    layers = random.normal(size=(2, 300, 6)).astype(np.float32)
    x = random.normal(size=(2, 900, 300)) * np.linspace(0.5, 2, 300)
    grams = (np.einsum("lni,lnj->lij", x, x) / 900).astype(np.float32)
    squares = random.random((2, 6)).astype(np.float32)
    apart, rules = {f"k{n}": layers[n] for n in range(2)}, ["k."]
    options = {"grams": {f"k{n}": grams[n] for n in range(2)}, "squares": {f"k{n}": squares[n] for n in range(2)}}
    masks, new = prune.sparsegpt(apart, None, rules, **options, sparsity=0.7)
    means = {f"k{n}": np.diagonal(grams[n]) for n in range(2)}
    counts = fisher.lowest(apart, means, options["squares"], sparsity=0.7, block=reconstruction.BLOCK)
    for path, mask in masks.items():
        gone = (~np.asarray(mask)).sum(1)
        assert [gone[at : at + 128].sum() for at in (0, 128, 256)] == counts[path].tolist()
        assert counts[path][0] > counts[path][1] + 20  # the inputs grow
    of_stack = {"grams": {"layers/kernel": grams}, "squares": {"layers/kernel": squares}, "sparsity": 0.7}
    stacked = prune.sparsegpt({"layers": {"kernel": layers}}, None, ["layers/kernel"], **of_stack)
    turned = {path: w.T for path, w in apart.items()}
    transposed = prune.sparsegpt(turned, None, [("k.", {"orientation": "out_in"})], **options, sparsity=0.7)
    for stack, other, one in zip(stacked, transposed, (masks, new), strict=True):
        for n in range(2):
            np.testing.assert_array_equal(stack["layers"]["kernel"][n], one[f"k{n}"])
            np.testing.assert_array_equal(np.asarray(other[f"k{n}"]).T, one[f"k{n}"])


def test_inputs_that_are_always_zero_go_first():
    gram = np.eye(6, dtype=np.float32)
    gram[2, 2] = 0
    options = {"grams": {"a": gram}, "squares": {"a": np.ones(3, np.float32)}, "sparsity": 1 / 6}
    masks, new = prune.sparsegpt({"a": np.ones((6, 3), np.float32)}, None, ["a"], **options)
    np.testing.assert_array_equal(masks["a"], np.arange(6)[:, None] != np.full((6, 3), 2))
    np.testing.assert_array_equal(new["a"], masks["a"])


def test_weights_that_stay_are_the_exact_solutions_of_what_goes():
    """In float64, without a factor of the inverse: the counts of the blocks are exact, and squares change no solution."""
    random = np.random.default_rng(1)
    x = random.normal(size=(120, 24)) @ (np.eye(24) + 0.4 * random.normal(size=(24, 24)))
    w, gram = random.normal(size=(24, 9)).astype(np.float32), (x.T @ x / 120).astype(np.float32)
    chosen = reconstruction.Chosen(np.array([90, 0, 36]), random.random(9).astype(np.float32))
    mask, new = reconstruction.reconstruct(w, gram, block=10, chosen=chosen)
    mask = np.asarray(mask)
    assert [(~mask[at : at + 10]).sum() for at in (0, 10, 20)] == [90, 0, 36]
    damped = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(24)
    expected = w.astype(np.float64)
    for i, kept in enumerate(mask):
        pruned = np.where(kept, 0, expected[i])
        expected[i] -= pruned
        expected[i + 1 :] += np.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i : i + 1] @ pruned[None])
    np.testing.assert_allclose(new, expected, atol=3e-5)


def test_layer_by_layer_each_kernel_loses_what_the_whole_model_says(encoder):
    """The counts come from the model before pruning; the weights that stay from the inputs behind the pruned layers."""
    model, params, batch, losses = encoder
    config = dsee_jax.DeltaConfig(targets=[".*/query/kernel"], rank=2, nonzeros=3, support="random")
    adapter = tiny.adapter(params, config, spread=0.1)
    options = {"score": "SPARSEGPT", "scope": "global", "sparsity": 0.6, "losses": cross_entropy}
    targets = ["encoder/.*/kernel"]
    behind, new = prune.layerwise(model, params, adapter, targets, [batch], **options)
    at_once, _ = prune.layerwise(model, params, adapter, targets, [batch], behind=False, **options)
    folded = jax.jit(dsee_jax.materialize)(params, adapter)
    direct, _ = prune.sparsegpt(
        *(params, adapter, targets),
        grams=prune.calibration.grams(model, folded, [batch]),
        squares=fisher.outputs(losses, folded, [*tree.flatten(behind)], [batch]),
        sparsity=0.6,
    )
    zeros, sizes = 0, 0
    for path, mask in tree.flatten(behind).items():
        gone = int((~np.asarray(mask)).sum())
        assert gone == (~np.asarray(tree.get(at_once, path))).sum() == (~np.asarray(tree.get(direct, path))).sum()
        assert (np.asarray(tree.get(new, path))[~np.asarray(mask)] == 0).all()
        zeros, sizes = zeros + gone, sizes + mask.size
    assert zeros == round(0.6 * sizes)
    assert len({np.asarray(mask).mean() for mask in tree.flatten(behind).values()}) > 1


def test_bad_input_names_the_fix(encoder):
    model, params, batch, losses = encoder
    with pytest.raises(InputError, match="no batches to measure gradients on"):
        fisher.outputs(losses, params, ["encoder/layer_0/mlp/up/kernel"], [])
    with pytest.raises(InputError, match=r"no nn\.Dense applies 'embeddings/word/embedding'.*leave it out"):
        fisher.outputs(losses, params, ["embeddings/word/embedding"], [batch])
    with pytest.raises(InputError, match=r"'k' has the shape \(2, 3, 4\); expected \(in, out\).*calibration\.apart"):
        fisher.outputs(losses, {"k": np.ones((2, 3, 4))}, ["k"], [batch])
    for square, line in (
        (jnp.ones(3), r"'k' needs squares of the shape \(2,\), of the gradients at its outputs; found \(3"),
        (jnp.zeros(2), "the gradients at the outputs of all kernels are 0, .* train the task head first"),
        (jnp.array([1, jnp.nan]), "the gradients at the outputs of 'k' are not finite: train the task head first"),
    ):
        with pytest.raises(InputError, match=line):
            prune.sparsegpt({"k": jnp.ones((4, 2))}, None, ["k"], grams={"k": jnp.eye(4)}, squares={"k": square})
    for more, line in (
        ({}, "scope is 'global' and there are no losses.*or scope='tensor'"),
        ({"n": 2, "m": 4, "losses": cross_entropy}, "scope is 'global'; expected tensor: groups of inputs"),
    ):
        options = {"score": "SPARSEGPT", "scope": "global"} | more
        with pytest.raises(InputError, match=line):
            prune.layerwise(model, params, None, ["encoder/.*/kernel"], [batch], **options)
