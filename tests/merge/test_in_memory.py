"""In-memory merging: trees of many kinds, options, gradients, sharding, and RankMean's invariants."""

import dataclasses
import os
import subprocess
import sys
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import merge
from dsee_jax.errors import InputError


def models(seed: int, count: int, layers: int = 3) -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(seed)

    def model():
        layer = lambda: {"query": {"kernel": rng.normal(size=(3, 2)).astype(np.float32)}}
        return {
            "embeddings": {"word": rng.normal(size=(4, 3)).astype(np.float32)},
            "encoder": {f"layer_{i}": layer() for i in range(layers)},
        }

    return model(), [model() for _ in range(count)]


def test_coefficients_are_ranks_over_their_sum():
    base = {f"layer_{i}": {"kernel": np.zeros(1, np.float32)} for i in range(3)}
    model = lambda *sizes: {f"layer_{i}": {"kernel": np.float32([size])} for i, size in enumerate(sizes)}
    distinct = merge.rankmean_coefficients(base, [model(1, 2, 3), model(9, -5, 1)])
    np.testing.assert_allclose([distinct[unit] for unit in "012"], [[1 / 4, 3 / 4], [1 / 2, 1 / 2], [3 / 4, 1 / 4]])
    tied = merge.rankmean_coefficients(base, [model(1, 1, 3), model(1, 2, 3)])
    np.testing.assert_allclose(tied["0"], [1.5 / 2.5, 1 / 2.5])
    ordered = merge.rankmean_coefficients(base, [model(1, 1, 3), model(1, 2, 3)], ties="order")
    np.testing.assert_allclose([ordered[unit] for unit in "012"], [[1 / 2, 1 / 2]] * 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.01, 100), st.sampled_from(["ascending", "reversed"]))
def test_coefficients_sum_to_one_and_ignore_scale_and_model_order(seed, count, factor, order):
    base, tuned = models(seed, count)
    coefficients = merge.rankmean_coefficients(base, tuned, order=order)
    scaled = jax.tree.map(lambda b, t: b + np.float32(factor) * (t - b), base, tuned[0])
    again = merge.rankmean_coefficients(base, [scaled, *tuned[1:]], order=order)
    swapped = merge.rankmean_coefficients(base, tuned[::-1], order=order)
    for unit, share in coefficients.items():
        np.testing.assert_allclose(np.sum(share), 1, rtol=1e-6)
        np.testing.assert_allclose(share, again[unit], rtol=1e-6)
        np.testing.assert_allclose(share, swapped[unit][::-1], rtol=1e-6)
        if count == 2:
            assert 1 / 4 - 1e-6 <= float(share[0]) <= 3 / 4 + 1e-6


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize("kind", ["dict", "list", "tuple", "frozen", "jax"])
def test_merged_tree_has_the_structure_and_types_of_the_base(kind):
    """Dicts, lists, NamedTuples and Flax's frozen dicts; bfloat16; integers are copied from the base."""
    make = {
        "dict": lambda a, b: {"a": a, "b": {"c": b}},
        "list": lambda a, b: [a, [b]],
        "tuple": lambda a, b: Pair(a, Pair(b, {})),
        "frozen": lambda a, b: flax.core.freeze({"a": a, "b": {"c": b}}),
        "jax": lambda a, b: {"a": jnp.asarray(a), "b": jnp.asarray(b)},
    }[kind]
    base = make(np.zeros((2, 3), ml_dtypes.bfloat16), np.arange(3))
    tuned = [make(np.full((2, 3), value, ml_dtypes.bfloat16), np.zeros(3, int)) for value in (1, 2)]
    merged = merge.merge(base, tuned, method="linear")
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    value, numbers = jax.tree.leaves(merged)
    assert value.dtype == jnp.bfloat16
    assert (np.asarray(value, np.float32) == 1.5).all()
    np.testing.assert_array_equal(numbers, [0, 1, 2])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """As a module of Equinox: leaves that are no arrays among the arrays."""

    weight: Any
    activation: Any
    rate: float


class Block(nnx.Module):
    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def test_leaves_that_are_no_arrays_are_merged():
    make = lambda weight: {"layers": [Layer(np.float32([weight]), jax.nn.relu, 0.1)], "name": "mlp"}
    merged = merge.linear(make(0), [make(1), make(3)], weight={"layers/0/weight": [0.75, 0.25]})
    assert (merged["layers"][0].activation, merged["layers"][0].rate, merged["name"]) == (jax.nn.relu, 0.1, "mlp")
    assert merged["layers"][0].weight == 1.5


@pytest.mark.parametrize("box", [nnx.Param, lambda array: nn.Partitioned(array, ("in", "out"))])
def test_the_path_of_a_boxed_tensor_does_not_end_at_the_box(box):
    base, *models = ({"dense": {"kernel": box(jnp.full((2, 2), value))}} for value in (0.0, 1.0, 3.0))
    merged = merge.linear(base, models, weight={"dense/kernel": [0.75, 0.25]})
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_array_equal(jax.tree.leaves(merged)[0], np.full((2, 2), 1.5))


@pytest.mark.parametrize("part", [nnx.state, lambda module: module, lambda module: nnx.to_pure_dict(nnx.state(module))])
def test_trees_of_nnx_lose_their_structure(part):
    """States, modules and pure dicts with integer keys; the counters and keys of random streams are the base's."""
    base, *models = (part(Block(seed)) for seed in range(3))
    merged = merge.linear(base, models, weight=[0.75, 0.25])
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for own, first, a, b in zip(*map(jax.tree.leaves, (merged, base, *models)), strict=True):
        if jnp.issubdtype(own.dtype, jnp.floating):
            np.testing.assert_allclose(own, 0.75 * a + 0.25 * b, rtol=1e-6)
        else:
            assert own is first


def test_partitioned_params_lose_their_boxes():
    box = lambda value: {"kernel": nn.Partitioned(np.full((2, 3), value, np.float32), names=("in", "out"))}
    merged = merge.linear(box(0), [box(1), box(3)], weight={"kernel": [0.5, 0.5]})
    assert isinstance(merged["kernel"], nn.Partitioned)
    assert merged["kernel"].names == ("in", "out")
    assert (np.asarray(merged["kernel"].value) == 2).all()


def test_hugging_face_names_are_grouped_by_layer():
    """A flat dict of names with dots; a float64 array without axes keeps its shape."""
    base = {"model.layers.0.w": np.zeros(2), "model.layers.1.w": np.zeros(2), "scale": np.float64(0)}
    tuned = [{name: value + 1 for name, value in base.items()}, {name: value + 3 for name, value in base.items()}]
    assert merge.rankmean_coefficients(base, tuned).keys() == {"0", "1"}
    merged = merge.merge(base, tuned, method="rankmean")
    np.testing.assert_allclose(merged["model.layers.0.w"], [2, 2])
    assert merged["scale"].shape == ()
    assert float(merged["scale"]) == 2


def test_base_may_be_none_unless_the_method_needs_one():
    """For nuslerp the models are enough; for ties a missing base is an error."""
    _, tuned = models(0, 2)
    merged = merge.merge(None, tuned, method="nuslerp")
    assert jax.tree.structure(merged) == jax.tree.structure(tuned[0])
    with pytest.raises(InputError, match="ties measures changes from a base"):
        merge.merge(None, tuned, method="ties")


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import merge
mesh = jax.make_mesh((2,), ("x",))
rng = np.random.default_rng(0)
trees = [{"layer_0": {"kernel": rng.normal(size=(8, 6)).astype(np.float32)}} for _ in range(4)]
put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x", None))), tree)
for method, options in {
    "linear": {}, "rankmean": {}, "ties": {"density": 0.4}, "dare_ties": {"density": 0.5}, "multislerp": {}, "sce": {},
    "lines": {"alpha": 0.5, "beta": 0.5},
}.items():
    run = lambda base, models: merge.merge(base, models, method=method, **options)["layer_0"]["kernel"]
    expected = run(trees[0], trees[1:])
    for function in (run, jax.jit(run)):
        merged = function(put(trees[0]), [put(tree) for tree in trees[1:]])
        np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6, err_msg=method)
        assert merged.sharding.is_equivalent_to(NamedSharding(mesh, P("x", None)), 2), (method, merged.sharding)
"""


def test_sharded_models_give_the_same_numbers_in_the_same_sharding():
    """Two simulated devices, with and without jit."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_merge_is_differentiable_in_the_coefficients():
    base, tuned = models(0, 2)
    shares = merge.rankmean_coefficients(base, tuned)
    total = lambda c: jnp.sum(
        merge.merge(base, tuned, method="rankmean", coefficients=c)["encoder"]["layer_0"]["query"]["kernel"]
    )
    gradient = jax.grad(total)(shares)
    np.testing.assert_allclose(
        gradient["0"], [np.sum(t["encoder"]["layer_0"]["query"]["kernel"]) for t in tuned], rtol=1e-5
    )


def test_models_of_a_generator_are_used_up():
    base, tuned = models(0, 2)
    for method in ("linear", "ties"):
        merged = [merge.merge(base, each, method=method) for each in (tuned, iter(tuned))]
        jax.tree.map(np.testing.assert_array_equal, *merged)
    coefficients = [merge.rankmean_coefficients(base, each) for each in (tuned, iter(tuned))]
    jax.tree.map(np.testing.assert_array_equal, *coefficients)


def test_bad_input_is_named():
    base, tuned = models(0, 2)
    with pytest.raises(InputError, match="did you mean 'rankmean'"):
        merge.merge(base, tuned, method="rankmaen")
    with pytest.raises(InputError, match="no option 'units'.*did you mean 'unit'"):
        merge.merge(base, tuned, units="layer")
    with pytest.raises(InputError, match="embeddings/word.*not in model 1"):
        merge.merge(base, [tuned[0], {"encoder": tuned[1]["encoder"]}])
    with pytest.raises(InputError, match="names no group"):
        merge.merge(base, tuned, unit="layer_.*")
    with pytest.raises(InputError, match="matches no tensor"):
        merge.merge(base, tuned, unit="(?P<unit>nothing)")
    with pytest.raises(InputError, match="give one each"):
        merge.merge(base, tuned, method="linear", weight=[1.0])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"density": -1}, r"ties: density\[0\] is -1; expected a number in \[0, 1\]"),
        ("ties", {"density": [0.5, 1.5]}, r"density\[1\] is 1.5"),
        ("ties", {"trim": "globl"}, "did you mean 'global'"),
        ("ties", {"normalize": "yes"}, "expected true or false"),
        ("slerp", {"t": 0.5}, "slerp merges 1 besides the base; found 2"),
        ("slerp", {}, "slerp needs the option 't'"),
        ("model_stock", {"weight": 1}, "model_stock has no option 'weight'"),
        ("linear", {"weight": [1, -1]}, "weights sum to 0"),
        ("della", {"density": 0.1}, "lower epsilon"),
        ("lines", {"alpha": 1, "beta": 0, "over": "tise"}, "did you mean 'ties'"),
        ("lines", {"alpha": 1, "beta": 0, "over": "ties", "densty": 1}, "did you mean 'density'"),
        ("rankmean", {"coefficients": {"0": [0.5, 0.5]}}, "no coefficients of unit '1'"),
        ("regmean", {"grams": [{}]}, "1 sets of Gram matrices for 2 models"),
        ("regmean", {"grams": [{"embeddings/word": np.eye(4)}] * 2}, r"is \(4, 4\); expected \(3, 3\)"),
        ("fisher", {"statistics": [{}, {}]}, "not in statistics 0"),
    ],
)
def test_bad_options_are_named(method, options, message):
    base, tuned = models(0, 2)
    with pytest.raises(InputError, match=message) as caught:
        merge.merge(base, tuned, method=method, **options)
    assert "\n" not in str(caught.value)


def test_traced_integer_option_is_refused():
    base, tuned = models(0, 2)
    with pytest.raises(InputError, match="seed is traced"):
        jax.jit(lambda seed: merge.merge(base, tuned, method="dare_ties", density=0.5, seed=seed))(1)
