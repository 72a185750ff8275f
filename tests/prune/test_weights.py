"""Pruning of trees: exact counts, pools, ties, updates, gradual schedules."""

import dataclasses
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsee_jax import tree
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError
from dsee_jax.masks import apply as apply_masks
from dsee_jax.prune import weights
from dsee_jax.prune.scores import SCORES

KEY = jax.random.key(0)


def kept(masks):
    return {path: np.asarray(mask).astype(int).tolist() for path, mask in tree.flatten(masks).items()}


def model(dtype=jnp.float32):
    """Return two updated kernels, a kernel without an update, an updated stack, and a bias; and the updates."""
    draw = np.random.default_rng(0)
    array = lambda *shape, dtype=jnp.float32: jax.device_put(draw.normal(size=shape).astype(np.float32).astype(dtype))
    params = {
        "q": {"kernel": array(8, 6, dtype=dtype), "bias": array(6)},
        "v": {"kernel": array(8, 6, dtype=dtype)},
        "f": {"kernel": array(8, 4, dtype=dtype)},
        "stack": {"kernel": array(3, 4, 6, dtype=dtype)},
    }
    deltas = {
        "q": {"kernel": {"a": array(8, 2), "b": array(2, 6), "values": array(2)}},
        "v": {"kernel": {"a": array(8, 2), "b": array(2, 6)}},
        "stack": {"kernel": {"a": array(3, 4, 2), "b": array(3, 2, 6), "values": array(3, 2)}},
    }
    supports = {
        "q": {"kernel": np.array([[0, 1], [5, 2]], np.int32)},
        "stack": {"kernel": np.array([[[0, 0], [1, 1]], [[0, 5], [2, 2]], [[1, 0], [3, 5]]], np.int32)},
    }
    return params, Adapter(deltas, jax.device_put(supports), 2.0, True)


def inputs(params):
    """Return a size of every input of every kernel."""
    return {
        path: np.linspace(1, 2, leaf.size // leaf.shape[-1], dtype=np.float32).reshape(leaf.shape[:-1])
        for path, leaf in tree.flatten(params).items()
        if path.endswith("/kernel")
    }


def gradients(params):
    """Return a gradient of every weight of every kernel."""
    return {
        path: np.sin(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        for path, leaf in tree.flatten(params).items()
        if path.endswith("/kernel")
    }


def dense_update(delta, support, shape, scale, sparse_scale):
    """Return the update of one kernel, in NumPy."""
    out = scale * np.asarray(delta["a"], np.float64) @ np.asarray(delta["b"], np.float64)
    if "values" in delta:
        for index, value in zip(np.asarray(support).reshape(-1, 2), np.asarray(delta["values"]).ravel(), strict=True):
            out[tuple(index)] += sparse_scale * value
    return out.reshape(shape)


def test_global_and_tensor_scope_literals():
    params = {
        "a": {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])},
        "b": {"kernel": jnp.array([[5.0, 6.0], [-7.0, 0.5]])},
    }
    args = (params, None, [".*/kernel"])
    assert kept(weights.unstructured(*args, score="W")) == {"a/kernel": [[0, 0], [0, 1]], "b/kernel": [[1, 1], [1, 0]]}
    both = kept(weights.unstructured(*args, score="W", scope="tensor"))
    assert both == {"a/kernel": [[0, 0], [1, 1]], "b/kernel": [[0, 1], [1, 0]]}


def test_ties_keep_the_lowest_index_in_the_order_of_the_tree():
    params = {"b": {"kernel": jnp.ones((2, 2))}, "a": {"kernel": -jnp.ones((2, 2))}}
    masks = weights.unstructured(params, None, [".*"], score="W", sparsity=0.25)
    assert kept(masks) == {"a/kernel": [[1, 1], [1, 1]], "b/kernel": [[1, 1], [0, 0]]}


@pytest.mark.parametrize("score", ["WABS", "WAB", "ABS", "AB", "NABS", "NAB", "W"])
@pytest.mark.parametrize("scale_sparse", [True, False])
def test_score_equals_its_definition(score, scale_sparse):
    """The definitions in NumPy; a kernel without an update scores |W|."""
    params, adapter = model()
    adapter = adapter.replace(scale=3.0, scale_sparse=scale_sparse)
    masks = weights.unstructured(params, adapter, ["(q|v|f)/kernel"], score=score, scope="tensor")
    for name in "qvf":
        w = np.asarray(params[name]["kernel"], np.float64)
        expected = np.abs(w)
        if name != "f" and score != "W":
            delta = adapter.deltas[name]["kernel"]
            support = adapter.supports.get(name, {}).get("kernel")
            if score.endswith("AB"):
                delta = {"a": delta["a"], "b": delta["b"]}
            d = dense_update(delta, support, w.shape, 3.0, 3.0 if scale_sparse else 1.0)
            expected = np.abs(w + d) if score.startswith("W") else np.abs(d)
            expected = 1 / expected if score.startswith("N") else expected
        np.testing.assert_array_equal(masks[name]["kernel"], expected >= np.median(expected))


@hypothesis.given(
    st.sampled_from(sorted(SCORES)),
    st.sampled_from(["global", "tensor", "output"]),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_number_of_pruned_weights_is_exact(score, scope, sparsity, tied):
    """For any score, scope and sparsity, with bfloat16 and stacked kernels, and with all scores tied."""
    params, adapter = model(jnp.bfloat16)
    if tied:
        zeros = lambda leaves: jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), leaves)
        params, adapter = zeros(params), adapter.replace(deltas=zeros(adapter.deltas))
    masks = weights.unstructured(
        *(params, adapter, [".*/kernel"]),
        score=score,
        scope=scope,
        sparsity=sparsity,
        key=KEY,
        inputs=inputs(params),
        gradients=gradients(params),
    )
    masks = tree.flatten(jax.tree.map(np.asarray, masks))
    parts = [layer for mask in masks.values() for layer in (mask if mask.ndim == 3 else [mask])]
    if scope == "output":
        parts = [column for mask in parts for column in mask.T]
    groups = [[mask] for mask in parts]
    if scope == "global":
        with_update = [mask for path, mask in masks.items() if path != "f/kernel"]
        alone = score in ("AB", "ABS", "NAB", "NABS")
        groups = [with_update, [masks["f/kernel"]]] if alone else [parts]
    for group in groups:
        total = sum(mask.size for mask in group)
        assert sum(int((~mask).sum()) for mask in group) == round(sparsity * total)
    assert all(masks[f"{name}/kernel"].shape == params[name]["kernel"].shape for name in params)


def test_wanda_prunes_the_weights_of_small_inputs():
    """Literals: |W| times the size of the input of the row, compared within the kernel or within each column."""
    params = {"a": {"kernel": jnp.array([[1.0, 2.0], [3.0, -4.0], [5.0, 0.0], [7.0, 9.0]])}}
    args = {"score": "WANDA", "inputs": {"a/kernel": jnp.array([9.0, 1.0, 2.0, 0.1])}}
    # scores [[9, 18], [3, 4], [10, 0], [.7, .9]]
    each = kept(weights.unstructured(params, None, [".*"], scope="tensor", **args))
    assert each == {"a/kernel": [[1, 1], [0, 1], [1, 0], [0, 0]]}
    of_outputs = weights.unstructured(params, None, [".*"], scope="output", sparsity=0.25, **args)
    assert kept(of_outputs) == {"a/kernel": [[1, 1], [1, 1], [1, 0], [0, 1]]}
    assert kept(weights.nm(params, None, [".*"], n=1, m=2, **args)) == {"a/kernel": [[1, 1], [0, 0], [1, 0], [0, 1]]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"of 'a/kernel' needs inputs of the shape \(4,\); found nothing"),
        ({"a/kernel": jnp.ones(3)}, r"found \(3,\)"),
    ],
)
def test_wanda_refuses_missing_or_misshapen_inputs(inputs, message):
    with pytest.raises(InputError, match=message):
        weights.unstructured({"a": {"kernel": jnp.ones((4, 2))}}, None, [".*"], score="WANDA", inputs=inputs)


def test_scope_output_keeps_earlier_masks():
    """Pruned entries stay pruned, and the number of zeros is exact in every column."""
    params = {"kernel": jax.random.normal(KEY, (8, 5))}
    options = {"score": "W", "scope": "output"}
    before = weights.unstructured(params, None, [".*"], sparsity=0.25, **options)
    moved = {"kernel": params["kernel"][::-1]}
    after = weights.unstructured(moved, None, [".*"], sparsity=0.5, keep=before, **options)
    assert (np.asarray(after["kernel"]).sum(0) == 4).all()
    assert (before["kernel"] | ~after["kernel"]).all()


def test_nan_score_is_pruned_first():
    params = {"kernel": jnp.array([[jnp.nan, 0.0], [-jnp.inf, -0.0]])}
    assert kept(weights.unstructured(params, None, ["kernel"], score="W", sparsity=0.25)) == {
        "kernel": [[0, 1], [1, 1]]
    }


def test_rule_with_options_makes_its_own_pool():
    """In a pool of its own a kernel loses its own share."""
    params = {"q": {"kernel": jnp.ones((4, 4))}, "f": {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}}
    adapter = Adapter({"q": {"kernel": {"a": jnp.full((4, 1), 0.01), "b": jnp.arange(1.0, 5)[None]}}}, {}, 2.0, True)
    rules = [("q/kernel", {"score": "ABS", "sparsity": 0.25}), (".*", True)]
    masks = weights.unstructured(params, adapter, rules, score="W", sparsity=0.75)
    assert masks["q"]["kernel"].astype(int).tolist() == [[0, 1, 1, 1]] * 4
    assert masks["f"]["kernel"].astype(int).tolist() == [[0] * 4] * 3 + [[1] * 4]


def test_false_rules_and_unmatched_paths_are_not_pruned():
    params, adapter = model()
    rules = [("v/kernel", False), ("[qv]/kernel", True)]
    assert list(tree.flatten(weights.unstructured(params, adapter, rules))) == ["q/kernel"]


def test_masks_only_shrink_along_the_cubic():
    """While the weights move, pruned entries stay pruned and the number of zeros is exact at every step."""
    masks, draw = None, np.random.default_rng(0)
    for step in range(5):
        params = {"a": {"kernel": draw.normal(size=(6, 8))}, "b": {"kernel": draw.normal(size=(6, 4))}}
        params["a"]["kernel"][0] = np.nan
        params = jax.device_put(params)
        sparsity = weights.cubic(0.5, steps=4)(step)
        new = weights.unstructured(params, None, [".*"], score="W", sparsity=sparsity, keep=masks)
        flat = tree.flatten(jax.tree.map(np.asarray, new))
        assert sum(int((~mask).sum()) for mask in flat.values()) == round(sparsity * 72)
        if masks:
            assert all(not (flat[path] & ~np.asarray(mask)).any() for path, mask in tree.flatten(masks).items())
        masks = new
    less = weights.unstructured(params, None, [".*"], score="W", sparsity=0.1, keep=masks)
    assert jax.tree.all(jax.tree.map(np.array_equal, less, masks))


@pytest.mark.parametrize("score", ["ABS", "AB", "NABS", "NAB"])
def test_scores_of_updates_and_of_weights_are_two_pools(score):
    """Each kind loses its share, also in a rule of its own, and along a gradual schedule."""
    params, adapter = model()
    small = adapter.replace(scale=0.02)
    masks = None
    for rules in ([".*/kernel"], [(".*/kernel", {"score": score})]):
        for sparsity in (0.25, 0.5):
            options = {} if isinstance(rules[0], tuple) else {"score": score}
            masks = weights.unstructured(params, small, rules, sparsity=sparsity, keep=masks, scope="global", **options)
            zeros = {path: int((~np.asarray(mask)).sum()) for path, mask in tree.flatten(masks).items()}
            assert zeros.pop("f/kernel") == round(sparsity * 32)
            assert sum(zeros.values()) == round(sparsity * (48 + 48 + 72))
        masks = None


def test_scores_of_weights_with_and_without_an_update_are_one_pool():
    """|W + D| and |W| compare: the kernel of the smaller weights loses more."""
    params, adapter = model()
    params["f"]["kernel"] = jax.device_put(np.asarray(params["f"]["kernel"]) / 100)
    masks = weights.unstructured(params, adapter, ["(q|v|f)/kernel"], score="WABS", sparsity=0.25)
    assert int((~np.asarray(masks["f"]["kernel"])).sum()) == 32


JITTED = {
    "global": {"scope": "global"},
    "tensor": {"scope": "tensor"},
    "output": {"scope": "output"},
    "score of the update": {"score": "ABS"},
    "inputs": {"score": "WANDA"},
    "inputs and sums": {"score": "RIA"},
    "gradients": {"score": "MOVEMENT"},
    "random": {"score": "random"},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", JITTED)
def test_masks_under_jit_equal_those_of_the_eager_call(name):
    """With everything traced, earlier masks and the sparsity too; params that the program computes itself included."""
    params, adapter = model(jnp.bfloat16)
    arrays = {"key": KEY, "inputs": inputs(params), "gradients": gradients(params)}
    draw = lambda params, adapter, **options: weights.unstructured(
        params, adapter, [".*/kernel"], **options, **JITTED[name]
    )
    keep = draw(params, adapter, sparsity=0.2, **arrays)

    @jax.jit
    def step(params, adapter, keep, sparsity, arrays):
        moved = jax.tree.map(lambda w: w * 1.01, params)
        traced, constant = (draw(moved, adapter, keep=keep, sparsity=each, **arrays) for each in (sparsity, 0.4))
        return moved, traced, constant

    moved, traced, constant = step(params, adapter, keep, jnp.float32(0.4), arrays)
    eager = draw(moved, adapter, keep=keep, sparsity=0.4, **arrays)
    assert kept(traced) == kept(constant) == kept(eager)


def test_nm_under_jit_equals_the_eager_call():
    draw = lambda params, adapter: weights.nm(params, adapter, [".*/kernel"], n=1, m=2)
    assert kept(jax.jit(draw)(*model())) == kept(draw(*model()))


def test_a_traced_sparsity_compiles_once_and_gives_the_count_of_its_float32():
    params = {"kernel": jax.random.normal(KEY, (50, 30))}
    draw = jax.jit(lambda sparsity: weights.unstructured(params, None, [".*"], score="W", sparsity=sparsity))
    for sparsity in (0.0, 0.1, 0.333, 0.5, 0.9999, 1.5, -1.0):
        zeros = int((~draw(sparsity)["kernel"]).sum())
        assert zeros == round(float(np.float32(min(max(sparsity, 0), 1 - 1e-7))) * 1500)
    assert draw._cache_size() == 1
    with pytest.raises(InputError, match=r"sparsity is 1\.5"):
        weights.unstructured(params, None, [".*"], sparsity=jnp.float32(1.5))


def test_pools_beyond_an_int32_trace():
    """By shape alone: a stacked kernel of 2.8e9 entries, and a pool of many smaller ones."""
    kernels = {str(number): jax.ShapeDtypeStruct((5120, 13824), jnp.bfloat16) for number in range(40)}
    for params in ({"layers": {"kernel": jax.ShapeDtypeStruct((40, 5120, 13824), jnp.bfloat16)}}, kernels):
        for scope in ("global", "tensor", "output"):
            draw = lambda params, scope=scope: weights.unstructured(params, None, [".*"], score="W", scope=scope)
            masks = jax.eval_shape(draw, params)
            assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, params)


def test_random_is_reproducible_and_differs_between_kernels():
    params = {name: {"kernel": jnp.ones((8, 8))} for name in "ab"}
    draw = lambda key: weights.unstructured(params, None, [".*"], score="random", scope="tensor", key=key)
    once = draw(KEY)
    assert kept(once) == kept(draw(KEY)) != kept(draw(jax.random.key(1)))
    assert once["a"]["kernel"].tolist() != once["b"]["kernel"].tolist()


def test_cubic_literals():
    schedule = weights.cubic(0.5, steps=10, begin=3)
    assert [schedule(step) for step in (0, 3, 8, 13, 20)] == [0, 0, 0.4375, 0.5, 0.5]
    assert weights.cubic(0.8, steps=2, initial=0.4)(1) == pytest.approx(0.75)
    # As optax's schedules: one function of a number, an array and a traced step.
    traced = jax.jit(schedule)(jnp.int32(8))
    assert (traced.dtype, traced) == (jnp.float32, 0.4375)
    expected = optax.polynomial_schedule(0.0, 0.5, power=3, transition_steps=10, transition_begin=3)
    np.testing.assert_allclose(schedule(jnp.arange(20)), expected(jnp.arange(20)), rtol=1e-6)


@pytest.mark.parametrize(
    ("final", "options", "message"),
    [
        (1.0, {"steps": 3}, r"final is 1\.0; expected a fraction of zeros"),
        (0.5, {"steps": 3, "initial": -0.1}, r"initial is -0\.1"),
        (0.5, {"steps": 0}, "steps is 0; expected the number of steps"),
    ],
)
def test_bad_schedule_is_named(final, options, message):
    with pytest.raises(InputError, match=message):
        weights.cubic(final, **options)


def test_nm_groups_run_along_the_inputs():
    params = {"a": {"kernel": jnp.array([[4.0], [-3.0], [2.0], [1.0]])}, "layers": {"kernel": jnp.ones((2, 8, 3))}}
    masks = weights.nm(params, None, [("a/kernel", {"n": 1, "m": 2}), (".*", True)])
    assert masks["a"]["kernel"].astype(int).ravel().tolist() == [1, 0, 1, 0]
    assert (
        masks["layers"]["kernel"].reshape(2, 2, 4, 3).astype(int) == jnp.array([1, 1, 0, 0]).reshape(1, 1, 4, 1)
    ).all()


def test_nm_reads_the_update():
    """The update has its largest entries at the last two of four inputs, the weight at the first two."""
    params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
    delta = {"a": jnp.array([[1.0], [2.0], [3.0], [4.0]]), "b": jnp.array([[0.01]])}
    adapter = Adapter({"kernel": delta}, {}, 2.0, True)
    assert kept(weights.nm(params, adapter, ["kernel"], score="ABS")) == {"kernel": [[0], [0], [1], [1]]}
    assert kept(weights.nm(params, adapter, ["kernel"], score="W")) == {"kernel": [[1], [1], [0], [0]]}


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (["q/kernel"], {"sparsity": 1.0}, r"sparsity is 1\.0; expected a fraction of zeros in \[0, 1\)"),
        (["q/kernel"], {"sparsity": -0.1}, r"sparsity is -0\.1"),
        (
            ["q/kernel"],
            {"sparsity": weights.cubic(0.5, steps=2)},
            "expected one number.*of a schedule, its value at a step",
        ),
        (["q/kernel"], {"sparsity": np.full(2, 0.5)}, r"sparsity is array\(\[0.5, 0.5\]\); expected one number"),
        ("q/kernel", {}, "the rules are 'q/kernel'; expected a sequence of regular expressions"),
        (["q/kernel"], {"score": "WABSS"}, "did you mean 'WABS'"),
        (["q/kernel"], {"score": "random"}, "needs a key"),
        (["q/kernel"], {"scope": "layer"}, "scope is 'layer'"),
        (["q/kernle"], {}, "matches nothing.*did you mean 'q/kernel'"),
        (["q/.*"], {}, "q/bias"),
        ([("q/kernel", {"sparsty": 0.1})], {}, "did you mean 'sparsity'"),
        ([("q/kernel", 0.5)], {}, "use True, False or a mapping"),
        (["q/kernel"], {"keep": {"v": {"kernel": jnp.ones((8, 6), bool)}}}, "same kernels"),
    ],
)
def test_bad_input_is_named(rules, options, message):
    params, adapter = model()
    with pytest.raises(InputError, match=message):
        weights.unstructured(params, adapter, rules, **options)


def test_bad_kernel_is_named():
    with pytest.raises(InputError, match="'kernel': 2:4 needs .* found 6"):
        weights.nm({"kernel": jnp.ones((6, 2))}, None, ["kernel"])
    sparse = Adapter({"kernel": {"values": jnp.ones(1)}}, {"kernel": jnp.zeros((1, 2), int)}, 2.0, True)
    for score in ("AB", "ABS"):
        with pytest.raises(
            InputError, match=f"'{score}' needs a low-rank update; that of 'kernel' has sparse values alone"
        ):
            weights.unstructured({"kernel": jnp.ones((4, 2))}, sparse, ["kernel"], score=score)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A layer as Equinox and PyTorch have it."""

    weight: Any
    bias: Any


ORIENTED = {
    "out_in": lambda matrix: matrix.T,
    "in_out_out": lambda matrix: matrix.reshape(8, 2, 6),
    "in_in_out": lambda matrix: matrix.reshape(2, 4, 12),
    "out_in_out": lambda matrix: matrix.reshape(8, 3, 4).transpose(1, 0, 2),
    "1_1_in_out": lambda matrix: matrix[None, None],
}


@pytest.mark.parametrize("axes", ORIENTED)
def test_masks_of_every_orientation_are_those_of_the_matrix(axes):
    """In a dataclass and a list; with ties, earlier masks and an update; N:M, per output and with the sizes of the inputs."""
    shaped, generator = ORIENTED[axes], np.random.default_rng(0)
    matrices = generator.normal(size=(2, 8, 12)).round(1).astype(np.float32)
    plain = {"0": {"weight": matrices[0]}, "1": {"weight": matrices[1]}}
    params = [Linear(jnp.asarray(shaped(matrix)), jnp.ones(12)) for matrix in matrices]
    delta = {"1": {"weight": {"a": generator.normal(size=(8, 2)), "b": generator.normal(size=(2, 12)).round(1)}}}
    adapters = Adapter(delta, {}, 0.1, True), Adapter(delta, {}, 0.1, True, orientations=(("1/weight", axes),))
    rules = [("./weight", {"orientation": axes})]
    for draw, options in (
        (weights.unstructured, {}),
        (weights.unstructured, {"scope": "tensor", "score": "ABS"}),
        (weights.unstructured, {"scope": "output"}),
        (weights.unstructured, {"scope": "output", "score": "WANDA", "sparsity": 0.25}),
        (weights.nm, {"n": 1}),
    ):
        if "WANDA" in options.values():
            options["inputs"] = {f"{number}/weight": np.arange(1.0, 9, dtype=np.float32) for number in range(2)}
        expected = draw(plain, adapters[0], [".*"], **options)
        masks = draw(params, adapters[1], rules, **options)
        for number in "01":
            np.testing.assert_array_equal(masks[number]["weight"], shaped(np.asarray(expected[number]["weight"])))
        pruned = apply_masks(params, masks)
        assert [type(layer) for layer in pruned] == [Linear, Linear]
        np.testing.assert_array_equal(pruned[0].weight != 0, masks["0"]["weight"] & (params[0].weight != 0))
        if draw is weights.unstructured:
            more = draw(params, adapters[1], rules, keep=masks, **options | {"sparsity": 0.75})
            expected = draw(plain, adapters[0], [".*"], keep=expected, **options | {"sparsity": 0.75})
            np.testing.assert_array_equal(more["1"]["weight"], shaped(np.asarray(expected["1"]["weight"])))


def test_attention_of_flax_is_pruned_along_its_inputs_and_outputs():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12)
    shapes = jax.eval_shape(attention.init, KEY, jnp.ones((1, 3, 8)))["params"]
    params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype), shapes)
    rules = [("(query|key|value)/kernel", {"orientation": "in_out_out"}), ("out/kernel", {"orientation": "in_in_out"})]
    columns = weights.unstructured(params, None, rules, score="W", scope="output", sparsity=0.25)
    groups = weights.nm(params, None, rules, score="W", n=1, m=2)
    assert columns["query"]["kernel"].shape == params["query"]["kernel"].shape == (8, 2, 6)
    assert (np.asarray(columns["query"]["kernel"]).sum(0) == 6).all()
    assert (np.asarray(columns["out"]["kernel"]).sum((0, 1)) == 9).all()
    assert (np.asarray(groups["query"]["kernel"]).reshape(4, 2, 12).sum(1) == 1).all()
    assert (np.asarray(groups["out"]["kernel"]).reshape(6, 2, 8).sum(1) == 1).all()


def test_layers_of_an_oriented_stack_lose_their_shares():
    params = {"w": jax.random.normal(KEY, (3, 6, 4))}
    masks = weights.unstructured(params, None, [("w", {"orientation": "stack_out_in"})], score="W", scope="tensor")
    assert (~masks["w"]).sum((1, 2)).tolist() == [12, 12, 12]
    rows = weights.unstructured(params, None, [("w", {"orientation": "stack_out_in"})], score="W", scope="output")
    assert ((~rows["w"]).sum(2) == 2).all()


def test_rule_with_an_orientation_alone_stays_in_the_common_pool():
    params = {"a": jnp.ones((4, 3)), "b": 2 * jnp.ones((4, 3)), "c": 3 * jnp.ones((2, 6))}
    rules = [("a", {"orientation": "out_in"}), ("b", True), ("c", {"orientation": "out_in", "sparsity": 0.25})]
    zeros = jax.tree.map(lambda mask: int((~mask).sum()), weights.unstructured(params, None, rules, score="W"))
    assert zeros == {"a": 12, "b": 0, "c": 3}


def test_bad_orientation_is_named():
    params = {"w": jnp.ones((4, 2, 2)), "v": jnp.ones((4, 4))}
    adapter = Adapter({"v": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}}, {}, 1.0, True)
    for rules, message in (
        (["w"], r"'w' has the shape \(4, 2, 2\); an array that is no kernel \(in, out\) needs an orientation"),
        ([("w", {"orientation": "in_out"})], r"orientation of 'w' is 'in_out' and its shape is \(4, 2, 2\)"),
        ([("v", {"orientation": "out_in"})], "rule of 'v' has the orientation 'out_in' and the adapter 'in_out'"),
        ([("v", {"orientatoin": "out_in"})], "did you mean 'orientation'"),
    ):
        with pytest.raises(InputError, match=message):
            weights.unstructured(params, adapter, rules)
    with pytest.raises(InputError, match=r"mask of 'v' in keep is \(4, 1\); expected \(4, 4\)"):
        weights.unstructured(params, None, ["v"], score="W", keep={"v": jnp.ones((4, 1), bool)})


@pytest.mark.parity
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_global_magnitude_pruning_equals_torch(sparsity):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as torch_prune

    draw = np.random.default_rng(0)
    kernels = [draw.normal(size=shape).astype(np.float32) for shape in ((6, 8), (8, 5), (5, 3))]
    layers = [torch.nn.Linear(w.shape[0], w.shape[1]) for w in kernels]
    for layer, w in zip(layers, kernels, strict=True):
        layer.weight.data = torch.tensor(w.T.copy())
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=torch_prune.L1Unstructured, amount=sparsity
    )
    params = {str(number): {"kernel": jnp.asarray(w)} for number, w in enumerate(kernels)}
    masks = weights.unstructured(params, None, [".*"], score="W", sparsity=sparsity)
    for number, layer in enumerate(layers):
        np.testing.assert_array_equal(masks[str(number)]["kernel"], layer.weight_mask.numpy().T.astype(bool))


def test_misspelt_keyword_of_the_evidence_is_an_error():
    options = {"inptus": {}}
    with pytest.raises(TypeError, match="unexpected keyword argument 'inptus' .did you mean 'inputs'"):
        weights.nm({"kernel": np.ones((4, 4), np.float32)}, None, [".*"], **options)
