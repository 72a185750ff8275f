"""Options of a merge in memory: for parts of the model, as recipes with filters; gradients; bad keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import checkpoints
import merge
from dsee_jax.errors import InputError
from merge import __main__ as command
from merge.method import KEYWORDS
from merge.methods import METHODS


def tree(rng):
    kernel = lambda: rng.normal(size=(4, 3)).astype(np.float32)
    layer = lambda: {"query": {"kernel": kernel()}, "dense": {"kernel": kernel(), "bias": kernel()[0]}}
    return {"embeddings": {"word": kernel()}, "encoder": {f"layer_{i}": layer() for i in range(3)}, "step": np.int32(3)}


@pytest.fixture
def trees():
    rng = np.random.default_rng(0)
    return tree(rng), [tree(rng), tree(rng)]


def assert_equal(merged, expected):
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


PER_MODEL = {"embeddings/word": 0.3, "0": [0.9, 0.2], "1": [0.1, 0.5], ".*layer_2/dense.*": 1.0}
CASES = {
    "linear": {"weight": PER_MODEL | {".*layer_2/query/kernel": 2.0}},
    "ties": {"weight": {"query": [0.9, 0.2]}, "density": {"0": 0.5, ".*": [0.25, 0.75]}, "vote": {"1": "unweighted"}},
    "dare_ties": {"density": {"0": 0.5, ".*dense/kernel": 0.1}, "seed": {"0": 1, ".*": 2}, "scale": {"2": 0.3}},
    "lines": {"over": "ties", "alpha": {"0": 0.3, ".*": 0.5}, "beta": 1.0, "density": {"1": 0.5}},
}
"""Keys: a layer, a path, the end of a path, a regular expression, and all other tensors."""

PARTS = {
    "0": ("encoder/layer_0/",),
    "1": ("encoder/layer_1/",),
    "2": ("encoder/layer_2/",),
    "embeddings/word": ("embeddings/word",),
    "query": ("/query/kernel",),
    ".*layer_2/dense.*": ("encoder/layer_2/dense",),
    ".*layer_2/query/kernel": ("encoder/layer_2/query/kernel",),
    ".*dense/kernel": ("layer_1/dense/kernel", "layer_2/dense/kernel"),
}
"""Texts, one of which a path holds if and only if the key matches the path."""


def named(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "lines"])
def test_option_by_part_differs_from_separate_merges_of_the_parts(trees, method):
    base, models = trees
    options = CASES[method] | ({"density": {"0": 0.5, "1": 0.1}} if method == "dare_ties" else {})
    merged = named(merge.merge(base, models, method=method, **options))
    for path, value in merged.items():

        def own(option, path=path):
            if not isinstance(option, dict):
                return {"value": option}
            keys = [key for key in option if key != ".*" and any(text in path for text in PARTS[key])]
            assert len(keys) <= 1
            return {"value": option[(keys or [".*"])[0]]} if keys or ".*" in option else {}

        plain = {key: own(option)["value"] for key, option in options.items() if own(option)}
        expected = named(merge.merge(base, models, method=method, **plain))
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_weights_by_layer_differ_from_coefficients_of_rankmean(trees):
    """Layers are named as `rankmean_coefficients` names them; tensors outside the layers have the default, the plain mean."""
    base, models = trees
    weight = merge.rankmean_coefficients(base, models)
    merged, expected = merge.linear(base, models, weight=weight), merge.rankmean(base, models)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), merged, expected)


def test_merge_in_memory_differs_from_a_recipe_with_the_same_filters(tmp_path):
    base, *models = checkpoints.family(tmp_path)
    weights = [{"attn": 0.9, "mlp": 0.2, None: 0.5}, {"attn": 0.3, "mlp": 0.7, None: 1.0}]
    filters = lambda values: [
        {"filter": key, "value": value} if key else {"value": value} for key, value in values.items()
    ]
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": f"model_{i}", "parameters": {"weight": filters(w)}} for i, w in enumerate(weights)],
        "parameters": {"density": filters({"layers.1.": 0.3, None: 0.6}), "lambda": filters({"norm": 2.0})},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert command.main([str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    weight = {f".*{key}.*" if key else ".*": [own[key] for own in weights] for key in weights[0]}
    merged = merge.ties(base, models, weight=weight, density={"1": 0.3, ".*": 0.6}, scale={".*norm.*": 2.0})
    for name, streamed in checkpoints.load(tmp_path / "out").items():
        np.testing.assert_allclose(merged[name], streamed, rtol=1e-6, atol=1e-6, err_msg=name)


def test_gradient_with_respect_to_a_mapping_differs_from_the_sums_of_changes(trees):
    """Inside ``grad`` and ``jit`` the keys of a dict are sorted: their order has no meaning."""
    base, models = trees
    weight = {"query": jnp.float32(0.3), "embeddings/word": jnp.asarray([0.2, 0.5]), ".*": jnp.float32(0.1)}

    def total(weight):
        merged = merge.task_arithmetic(base, models, weight=weight, scale={"1": 2.0})
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(merged))

    gradient = jax.jit(jax.grad(total))(weight)
    changes = [named(jax.tree.map(np.subtract, model, base)) for model in models]
    sums = [
        {path: float(np.sum(part)) * (2 if "layer_1" in path else 1) for path, part in own.items()} for own in changes
    ]
    np.testing.assert_allclose(gradient["embeddings/word"], [own["embeddings/word"] for own in sums], rtol=1e-4)
    query = sum(value for own in sums for path, value in own.items() if path.endswith("query/kernel"))
    dense = sum(value for own in sums for path, value in own.items() if "dense" in path)
    np.testing.assert_allclose([gradient["query"], gradient[".*"]], [query, dense], rtol=1e-4)


NUMERIC = [
    name
    for name, method in METHODS.items()
    if any(option.kind is float and option.effect for option in {**method.each, **method.shared}.values())
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NUMERIC)
def test_traced_number_gives_other_values_or_a_long_error(name):
    """Under ``jit`` the numbers of every method give the same result, or one line says that a number must be constant."""
    method = METHODS[name]
    rng = np.random.default_rng(0)
    base, *models = ({"layers/0/w": rng.normal(size=(4, 3)).astype(np.float32)} for _ in range(3))
    models = models[: method.models[1] or 2]
    data = {
        "elements": {"statistics": [{key: x**2 for key, x in model.items()} for model in models]},
        "grams": {"grams": [{key: x.T @ x for key, x in model.items()} for model in models]},
    }.get(method.statistics, {})
    options = {KEYWORDS.get(key, key): option for key, option in {**method.each, **method.shared}.items()}
    numbers = {key: 0.6 if key == "density" else 0.3 for key, option in options.items() if option.kind is float}
    run = lambda values: merge.merge(base, models, method=name, **{**numbers, **values}, **data)["layers/0/w"]
    traced = {key: value for key, value in numbers.items() if not options[key].static}
    if traced:
        np.testing.assert_allclose(jax.jit(run)(traced), run(traced), rtol=1e-5, atol=1e-6)
    for key in numbers.keys() - traced.keys():
        with pytest.raises(InputError, match=f"{key}.* is traced; expected a constant"):
            jax.jit(run)({key: 0.4})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"weight": {"qurey": 1.0}}, r"linear: weight: rule 'qurey' matches nothing.*the layers are 0, 1, 2$"),
        ("linear", {"weight": {"7": 1.0}}, r"weight: rule '7' matches nothing.*the layers are 0, 1, 2$"),
        ("linear", {"weight": {"(": 1.0}}, r"weight: rule '\(' is not a regular expression"),
        ("linear", {"weight": {"step": 1.0}}, "weight: rule 'step' matches nothing"),
        ("linear", {"weight": {"0": [1.0, 2.0, 3.0]}}, r"weight\['0'\] has 3 values for 2 models; give one each"),
        ("linear", {"weight": {"0": "high"}}, r"weight\['0'\]\[0\] is 'high'; expected a number"),
        ("linear", {"weight": {"0": {"query": 1.0}}}, r"weight\['0'\]\[0\] is {'query': 1.0}; expected a number"),
        ("linear", {"weight": {"0": 1.0, "query": 2.0}}, "'0' and 'query' both match 'encoder/layer_0/query/kernel'; .*'.*'"),
        ("linear", {"weight": {".*(query|dense|word).*": 2.0, ".*": 1.0}}, r"'\.\*' matches nothing: the other keys match"),
        ("linear", {"weight": {"0": [1, -1], ".*": 1}}, "linear, for 'encoder/layer_0/.*': the weights sum to 0"),
        ("linear", {"weight": np.ones((2, 2))}, r"weight\[0\] has shape \(2,\); expected a number"),
        ("ties", {"density": {"query": [0.5, 1.5]}}, r"density\['query'\]\[1\] is 1.5; expected a number in \[0, 1\]"),
        ("ties", {"trim": {"0": "globl"}}, r"trim\['0'\] is 'globl' \(did you mean 'global'\?\)"),
        ("ties", {"normalize": {"0": [True, True]}}, r"normalize\['0'\] is \[True, True\]; expected true or false"),
        ("lines", {"alpha": {"0": 0.5}, "beta": 0}, "lines: alpha has no value for 'embeddings/word'; add the key '.*'"),
        ("lines", {"alpha": 1, "beta": 0, "over": {"0": "ties"}}, "lines over {'0': 'ties'}; expected one of"),
        ("rankmean", {"unit": {"0": "tensor"}}, "rankmean's options hold for the whole model"),
    ],
)  # fmt: skip
def test_bad_key_or_value_of_a_mapping_is_not_named(trees, method, options, message):
    base, models = trees
    with pytest.raises(InputError, match=message) as caught:
        merge.merge(base, models, method=method, **options)
    assert "\n" not in str(caught.value)
