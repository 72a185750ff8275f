"""Any pytree: the structure, the containers, the keys and the boxes that went in come out."""

import collections
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from flax.core import freeze
from flax.core.meta import AxisMetadata

import dsee_jax
from dsee_jax import DeltaConfig, InputError, tree

KEY = jax.random.key(0)


class Affine(NamedTuple):
    kernel: Any
    bias: Any


@struct.dataclass
class Layer:
    kernel: Any
    name: str = struct.field(pytree_node=False)
    below: Any = None


class Net(nnx.Module):
    """Layers in a list, one of them twice, with metadata, random keys and statistics."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, kernel_metadata={"note": "kept"}, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 4, rngs=rngs), self.first])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        back, again = self.layers
        return self.norm(again(back(self.first(x))))


def kernel(seed):
    return jax.random.normal(jax.random.key(seed), (4, 6))


def equinox_model():
    eqx = pytest.importorskip("equinox")
    layers = [
        eqx.nn.Linear(6, 4, key=KEY),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.LayerNorm(4),
        eqx.nn.Linear(4, 6, key=KEY),
    ]
    return eqx.nn.Sequential(layers)


def state(*filters):
    return nnx.state(Net(nnx.Rngs(0)), *filters)


NET = ["first/kernel", "layers/0/kernel"]
TREES = {
    "dict": (lambda: {"a": {"kernel": kernel(0), "bias": jnp.zeros(6)}, "b": None}, ["a/kernel"]),
    "integer keys": (
        lambda: {"layers": {n: {"kernel": kernel(n)} for n in (0, 2, 10)}},
        ["layers/0/kernel", "layers/2/kernel", "layers/10/kernel"],
    ),
    "ordered dict": (lambda: collections.OrderedDict(z=kernel(0), a=kernel(1)), ["z", "a"]),
    "frozen dict": (lambda: freeze({"a": {"kernel": kernel(0)}}), ["a/kernel"]),
    "list with a function": (lambda: [kernel(0), (jax.nn.relu, {"kernel": kernel(1)}, "text")], ["0", "1/1/kernel"]),
    "named tuple": (lambda: Affine(kernel(0), Affine(kernel(1), jnp.zeros(6))), ["kernel", "bias/kernel"]),
    "dataclass": (lambda: Layer(kernel(0), "top", [Layer(kernel(1), "low")]), ["kernel", "below/0/kernel"]),
    "NumPy": (lambda: {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6)}, ["kernel"]),
    "Partitioned": (lambda: {"a": {"kernel": nn.Partitioned(kernel(0), names=("in", "out"))}}, ["a/kernel"]),
    "LogicallyPartitioned": (lambda: {"kernel": nn.LogicallyPartitioned(kernel(0), names=("in", "out"))}, ["kernel"]),
    "NNX state": (lambda: state(nnx.Param), NET),
    "NNX state of all variables": (state, NET),
    "NNX pure dict": (lambda: nnx.to_pure_dict(state(nnx.Param)), NET),
    "NNX module": (lambda: Net(nnx.Rngs(0)), NET),
    "Equinox": (equinox_model, ["layers/0/weight", "layers/3/weight"]),
}


@pytest.fixture(params=TREES, scope="module")
def kind(request):
    """A tree, the paths of its kernels, and their orientation."""
    make, paths = TREES[request.param]
    return make(), paths, "out_in" if request.param == "Equinox" else "in_out"


def described(leaf):
    """A leaf, with the kind and the metadata of its boxes, without its numbers."""
    if isinstance(leaf, nnx.Variable):
        return type(leaf), leaf.get_metadata(), described(leaf.get_value())
    if isinstance(leaf, AxisMetadata):
        return type(leaf), leaf.names, described(leaf.unbox())
    if isinstance(leaf, jax.Array | np.ndarray):
        return isinstance(leaf, np.ndarray), leaf.shape, leaf.dtype
    return leaf


def assert_alike(out, into):
    """Equal in everything but the numbers."""
    is_box = lambda node: isinstance(node, AxisMetadata | nnx.Variable)
    (pairs, structure), (expected, expected_structure) = (
        jax.tree_util.tree_flatten_with_path(each, is_leaf=is_box) for each in (out, into)
    )
    assert type(out) is type(into)
    assert structure == expected_structure
    assert [(path, described(leaf)) for path, leaf in pairs] == [(path, described(leaf)) for path, leaf in expected]


def numbers(value):
    return np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)


def assert_equal_elsewhere(out, into, paths):
    """Equal at all other paths than ``paths``."""
    before = tree.arrays(into)
    for path, value in tree.arrays(out).items():
        assert path in paths or np.array_equal(numbers(value), numbers(before[path])), path


def adapter_of(params, paths, orientation):
    targets = [(path, {"orientation": orientation}) for path in paths]
    config = DeltaConfig(targets=targets, rank=2, nonzeros=3, support="magnitude")
    adapter = dsee_jax.deltas.init(params, config, key=KEY)
    return adapter.replace(deltas=jax.tree.map(lambda x: x + 0.5, adapter.deltas))


def test_paths_name_the_leaves(kind):
    params, paths, _ = kind
    flat = tree.arrays(params)
    assert [path for path in flat if flat[path].ndim == 2] == paths


def test_replaced_leaves_keep_everything_around_them(kind):
    params, paths, _ = kind
    flat = tree.flatten(params)
    out = tree.replace(params, {paths[-1]: flat[paths[-1]] + 1})
    assert_alike(out, params)
    np.testing.assert_array_equal(tree.flatten(out)[paths[-1]], flat[paths[-1]] + 1)
    assert_equal_elsewhere(out, params, paths[-1:])


def test_materialised_updates_keep_everything_around_them(kind):
    params, paths, orientation = kind
    adapter = adapter_of(params, paths, orientation)
    out = dsee_jax.materialize(params, adapter)
    # The sum of a NumPy kernel and an update of JAX is an array of JAX.
    assert_alike(
        out, jax.tree.map(jnp.asarray, params) if isinstance(tree.flatten(params)[paths[0]], np.ndarray) else params
    )
    assert_equal_elsewhere(out, params, paths)
    for path in paths:
        delta, support = tree.get(adapter.deltas, path), tree.get(adapter.supports, path)
        dense = np.asarray(delta["a"] @ delta["b"], np.float64)
        np.add.at(dense, tuple(np.asarray(support).T), np.asarray(delta["values"]))
        expected = np.asarray(tree.flatten(params)[path]) + adapter.scale * (
            dense.T if orientation == "out_in" else dense
        )
        np.testing.assert_allclose(tree.flatten(out)[path], expected, atol=1e-5)


def test_masked_kernels_keep_everything_around_them(kind):
    params, paths, _ = kind
    masks = dsee_jax.prune.unstructured(params, None, paths, sparsity=0.25, score="W")
    if isinstance(tree.flatten(params)[paths[0]], np.ndarray):
        masks = jax.tree.map(np.asarray, masks)
    out = dsee_jax.masks.apply(params, masks)
    assert_alike(out, params)
    assert_equal_elsewhere(out, params, paths)
    pool = np.concatenate([np.abs(tree.flatten(params)[path]).ravel() for path in paths])
    kept = np.concatenate([np.abs(tree.flatten(out)[path]).ravel() for path in paths])
    np.testing.assert_array_equal(np.sort(kept)[len(pool) // 4 :], np.sort(pool)[len(pool) // 4 :])
    assert not np.sort(kept)[: len(pool) // 4].any()


# A function and a text are no arguments of jit.
@pytest.mark.parametrize("kind", sorted(TREES.keys() - {"list with a function", "Equinox"}), indirect=True)
def test_all_of_it_works_under_jit(kind):
    params, paths, orientation = kind
    adapter = adapter_of(params, paths, orientation)
    out = jax.jit(dsee_jax.materialize)(params, adapter)
    for path, value in tree.arrays(dsee_jax.materialize(params, adapter)).items():
        np.testing.assert_allclose(numbers(tree.flatten(out)[path]), numbers(value), atol=1e-6)


def test_shared_variables_of_an_nnx_module_stay_shared():
    module = Net(nnx.Rngs(0))
    out = tree.replace(module, {"first/kernel": jnp.zeros((4, 6))})
    assert out.first.kernel is out.layers[1].kernel
    assert not out.layers[1].kernel[...].any()
    assert module.first.kernel[...].any()
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(out(x), nnx.clone(out)(x))


def test_replaced_modules_and_states_share_no_variable_with_the_given_one():
    module = Net(nnx.Rngs(0))
    for given in (module, nnx.state(module)):
        out = tree.replace(given, {})
        for path, variable in nnx.to_flat_state(nnx.state(out)):
            variable[...] = variable[...] if path[-1] == "key" else variable[...] + 1
    np.testing.assert_array_equal(module.norm.mean[...], np.zeros(6))


@pytest.mark.parametrize("leaf", [1.0, kernel(0)], ids=["number", "array"])
def test_two_leaves_of_one_path_are_refused(leaf):
    with pytest.raises(InputError, match="two leaves of the tree have the path 'a/b'"):
        tree.flatten({"a/b": leaf, "a": {"b": leaf}})
