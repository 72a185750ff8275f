"""Every method, from one table of cases: its definition in float64, its invariants, and jit and grad."""

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compiled
import merge
from dsee_jax.errors import InputError
from merge import noise
from merge.leaf import Tile, positions
from merge.methods import dare, find, sparse_sum, ties
from merge.topk import Selection

SHAPES = {"embed": (5, 4), "layers/0/kernel": (5, 4), "layers/1/kernel": (5, 4), "layers/1/bias": (7,), "scalar": ()}


class Case(NamedTuple):
    """A method with options, and the options with which equal models merge to that model, if any."""

    method: str
    options: dict
    mean: Mapping | None = MappingProxyType({})
    models: int = 3
    base: bool = True
    permutes: bool = True  # permuting the models and their options does not change the merge
    scales: bool = True  # scaling all changes scales the merged change


WEIGHT = {"weight": [0.2, 0.9, 0.4]}
SPARSE = WEIGHT | {"density": [0.3, 0.5, 0.8]}
AVERAGE = {"density": 1.0, "normalize": True}
CASES = {
    "linear": Case("linear", WEIGHT, base=False),
    "linear unnormalized": Case("linear", WEIGHT | {"normalize": False}, {"weight": 1 / 3}, base=False, scales=False),
    "task_arithmetic": Case("task_arithmetic", WEIGHT | {"scale": 0.7}, {"normalize": True, "scale": 1.0}),
    "passthrough": Case("passthrough", {"scale": 1.5}, {"scale": 1.0}, models=1, base=False, scales=False),
    "rankmean": Case("rankmean", {}),
    "rankmean tensors": Case("rankmean", {"unit": "tensor", "order": "reversed"}),
    "ties": Case("ties", SPARSE, AVERAGE),
    "ties global": Case("ties", SPARSE | {"trim": "global", "rescale": True}, AVERAGE),
    "ties keep": Case("ties", SPARSE | {"trim_ties": "keep", "vote": "unweighted"}, AVERAGE),
    # The random mask of a model depends on its number.
    "dare_ties": Case("dare_ties", SPARSE, AVERAGE, permutes=False),
    "dare_linear": Case("dare_linear", SPARSE | {"rescale_norm": "inverse"}, AVERAGE, permutes=False),
    "della": Case("della", SPARSE, AVERAGE, permutes=False),
    "della_linear": Case("della_linear", SPARSE | {"rescale": False, "seed": 3}, AVERAGE, permutes=False),
    "breadcrumbs": Case("breadcrumbs", SPARSE | {"gamma": 0.1}, AVERAGE),
    "breadcrumbs_ties": Case("breadcrumbs_ties", SPARSE, AVERAGE),
    # Arcs about the origin do not scale with the changes, and neither does a limit of t.
    "slerp": Case("slerp", {"t": 0.3}, {"t": 1.0}, models=1, scales=False),
    "nearswap": Case("nearswap", {"t": 0.05}, {"t": 1e6}, models=1, scales=False),
    "karcher": Case("karcher", {}, base=False, scales=False),
    "nuslerp": Case("nuslerp", {"weight": [0.3, 0.9]}, models=2),
    "nuslerp rows": Case("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False}, models=2),
    "nuslerp columns": Case(
        "nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}, models=2
    ),
    "multislerp": Case("multislerp", WEIGHT),
    "model_stock": Case("model_stock", {}),
    "model_stock rows": Case("model_stock", {"filter_wise": True}),
    "sce": Case("sce", {}),
    "sce selected": Case("sce", {"select_topk": 0.4}, {"select_topk": 1.0}),
    "ram": Case("ram", {"epsilon": 0.3}, {"epsilon": 0.0}, scales=False),
    "ramplus_tl": Case("ramplus_tl", {"epsilon": 0.3, "r": 0.5, "alpha": 0.7}, {"epsilon": 0.0}, scales=False),
    "arcee_fusion": Case("arcee_fusion", {}, None, models=1, scales=False),
    "fisher": Case("fisher", WEIGHT, base=False),
    "regmean": Case("regmean", {"alpha": 0.9}, base=False),
    "lines": Case("lines", WEIGHT | {"alpha": 0.3, "beta": 0.9}, {"alpha": 1.0, "beta": 0.0, "normalize": True}),
    "lines over ties": Case(
        "lines",
        SPARSE | {"over": "ties", "alpha": 0.3, "beta": 0.9, "trim": "global"},
        AVERAGE | {"alpha": 1, "beta": 0},
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def test_every_method_has_a_case():
    assert {case.method for case in CASES.values()} == set(merge.METHODS)


def tree(rng, size=1.0):
    return {name: np.asarray(rng.normal(size=shape) * size, np.float32) for name, shape in SHAPES.items()}


def random_models(seed, case, spread=0.5):
    """A base, and models that share a part of their changes."""
    rng = np.random.default_rng(seed)
    base, common = tree(rng), tree(rng, spread / 2)
    parts = [tree(rng, spread * (1 + i / 2)) for i in range(case.models)]
    return base, [{name: base[name] + common[name] + part[name] for name in SHAPES} for part in parts]


def data(case):
    """The statistics for fisher and regmean, the same for every seed."""
    rng = np.random.default_rng(9)
    if case.method == "fisher":
        return {"statistics": [{name: part**2 for name, part in tree(rng).items()} for _ in range(case.models)]}
    if case.method == "regmean":
        inputs = [rng.normal(size=(30, 4)).astype(np.float32) for _ in range(case.models)]
        return {"grams": [{"layers/0/kernel": x.T @ x / 30, "embed": x.T @ x / 30} for x in inputs]}
    return {}


def run(case, base, models, **options):
    return merge.merge(base if case.base else None, models, method=case.method, **case.options | options)


def assert_close(merged, expected, tolerance=1e-5):
    for name, value in expected.items():
        size = tolerance * max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(merged[name], value, rtol=tolerance, atol=size, err_msg=name)


# Invariants


@pytest.mark.sampled(3)
@each_case
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_permutation_copies_and_scaling_are_respected(name, seed, factor):
    """Permuted models, unchanged models, copies of one model, and scaled changes."""
    case = CASES[name]
    base, models = random_models(seed, case)
    extra = data(case)
    merged = run(case, base, models, **extra)
    assert all(np.isfinite(value).all() for value in merged.values())
    if case.permutes:
        turn = lambda values: [*values[1:], values[0]]
        listed = {key: turn(value) for key, value in case.options.items() if isinstance(value, list)}
        extras = {key: turn(value) for key, value in extra.items()}
        assert_close(run(case, base, turn(models), **listed, **extras), merged)
    if case.mean is not None:
        assert_close(run(case, base, [models[0]] * case.models, **extra, **case.mean), models[0])
    assert_close(run(case, base, [base] * case.models, **extra, **(case.mean or {})), base)
    if case.scales:
        moved = lambda model: {key: base[key] + np.float32(factor) * (model[key] - base[key]) for key in SHAPES}
        assert_close(run(case, base, [moved(model) for model in models], **extra), moved(merged), 1e-4)


@pytest.mark.sampled(2)
@each_case
@pytest.mark.parametrize("fill", ["zeros", "opposite", "tiny", "large"])
def test_extreme_changes_give_finite_results(name, fill):
    """All zeros, changes that cancel, changes near the smallest floats, and large changes."""
    case = CASES[name]
    base, models = random_models(0, case)
    zeros = {key: np.zeros_like(value) for key, value in base.items()}
    signs = itertools.cycle([1, -1])
    scale = {"zeros": 0.0, "opposite": 1.0, "tiny": 1e-36, "large": 1e15}[fill]
    models = [
        {
            key: np.float32(scale) * (next(signs) * models[0][key] if fill == "opposite" else model[key])
            for key in SHAPES
        }
        for model in models
    ]
    merged = run(case, zeros, models, **data(case))
    assert all(np.isfinite(value).all() for value in merged.values()), merged


# Definitions, in float64


def definition(case, name, base, models):
    """The merged tensor ``name``, by the formula of the method's source."""
    o, method = case.options, case.method
    t0 = np.float64(base[name])
    ts = [np.float64(model[name]) for model in models]
    ds, count = [t - t0 for t in ts], len(ts)
    w = np.float64(o.get("weight", [1.0] * count))
    n = t0.size
    norm, mean = np.linalg.norm, lambda values: sum(values) / len(values)
    if method == "linear":
        total = sum(a * t for a, t in zip(w, ts, strict=True))
        return total / sum(w) if o.get("normalize", True) else total
    if method == "passthrough":
        return 1.5 * ts[0]
    if method == "slerp":
        angle = np.arccos(np.sum(t0 * ts[0]) / norm(t0) / norm(ts[0]))
        if n == 1:
            return 0.7 * t0 + 0.3 * ts[0]
        return (np.sin(0.7 * angle) * t0 + np.sin(0.3 * angle) * ts[0]) / np.sin(angle)
    if method == "nearswap":
        return t0 + np.sign(ds[0]) * np.minimum(np.abs(ds[0]), o["t"])
    if method == "nuslerp":
        axis = None if o.get("nuslerp_flatten", True) or t0.ndim == 0 else -1
        if o.get("nuslerp_row_wise") and t0.ndim == 2:
            axis = 0
        total = lambda x: (
            np.sum(x, axis=axis, keepdims=True).reshape(-1)[0] if axis is None else x.sum(axis, keepdims=True)
        )
        cosine = total(ds[0] * ds[1]) / np.sqrt(total(ds[0] ** 2) * total(ds[1] ** 2))
        angle = np.arccos(np.clip(cosine, -1, 1))
        t = w[1] / w.sum()
        if n == 1:
            return t0 + (1 - t) * ds[0] + t * ds[1]
        return t0 + (np.sin((1 - t) * angle) * ds[0] + np.sin(t * angle) * ds[1]) / np.sin(angle)
    if method == "multislerp":
        w = w / w.sum()
        direction = sum(a * d / norm(d) for a, d in zip(w, ds, strict=True))
        return t0 + direction / norm(direction) * sum(a * norm(d) for a, d in zip(w, ds, strict=True))
    if method == "karcher":
        if n == 1:
            return np.sign(np.sum(np.sign(ts))) * mean(np.abs(ts))
        units = [t / norm(t) for t in ts]
        point = mean(units) / norm(mean(units))
        for _ in range(50):
            angles = [np.arccos(np.clip(np.sum(point * u), -1, 1)) for u in units]
            tangent = mean([a / np.sin(a) * (u - np.cos(a) * point) for a, u in zip(angles, units, strict=True)])
            size = norm(tangent)
            if size < 1e-12:
                break
            point = np.cos(size) * point + np.sin(size) * tangent / size
        return point * mean([norm(t) for t in ts])
    if method == "model_stock":
        axis = -1 if o.get("filter_wise") and t0.ndim else None
        dot = lambda a, b: np.sum(a * b, axis=axis, keepdims=axis is not None)
        cosine = mean([dot(a, b) / np.sqrt(dot(a, a) * dot(b, b)) for a, b in itertools.combinations(ds, 2)])
        return t0 + count * cosine / (1 + (count - 1) * cosine) * mean(ds)
    if method == "sce":
        variance = np.var(ds, axis=0)
        kept = ranked(variance) >= n - int(n * np.float32(o.get("select_topk", 1.0)))
        ds = [np.where(kept, d, 0) for d in ds]
        energy = np.array([np.mean(d**2) for d in ds])
        # If no element is selected, all models have equal weights.
        energy = energy / energy.sum() if energy.sum() > 1e-6 else np.full(count, 1 / count)
        return t0 + elected(ds, energy, ds, normalize=True)
    if method == "arcee_fusion":
        chances = [
            np.exp(t) / np.sum(np.exp(t), axis=-1 if t0.ndim else None, keepdims=True) + 1e-8 for t in (ts[0], t0)
        ]
        divergence = np.sum(chances[0] * np.log(chances[0] / chances[1]), axis=-1 if t0.ndim else None, keepdims=True)
        importance = np.abs(ds[0]) * divergence
        quartiles = np.sort(np.ravel(importance))[[(n - 1) // 4, (n - 1) // 2, 3 * (n - 1) // 4]]
        return np.where(importance >= quartiles[1] + 1.5 * (quartiles[2] - quartiles[0]), ts[0], t0)
    if "ram" in method:
        changed = [np.abs(d) > o["epsilon"] for d in ds]
        times = sum(changed)
        lone = [np.sum(c & (times == 1)) for c in changed]
        ratios = [np.sum(c & (times > 1)) / max(k, o["epsilon"]) for c, k in zip(changed, lone, strict=True)]
        factors = [1 + o["r"] * np.clip(ratio, 0, o["alpha"]) if "r" in o else 1 for ratio in ratios]
        shares = [np.where(times == 1, factor, 1 / np.maximum(times, 1)) for factor in factors]
        return t0 + sum(c * share * d for c, share, d in zip(changed, shares, ds, strict=True))
    if method in ("fisher", "regmean"):
        return data_weighted(case, name, ts, w)
    # The other methods sparsify the changes, weight them, and add them up, with or without an election.
    inner = o.get("over", method) if method == "lines" else method
    density = o.get("density", [1.0] * count)
    if inner == "ties":
        if o.get("trim") == "global":
            sizes = [np.concatenate([np.ravel(np.float64(m[k]) - base[k]) for k in SHAPES]) for m in models]
            ks = [max(1, int(p * s.size)) for p, s in zip(density, sizes, strict=True)]
            kept = [np.abs(d) >= np.sort(np.abs(s))[-k] for d, s, k in zip(ds, sizes, ks, strict=True)]
        elif o.get("trim_ties") == "keep":
            kept = [ranked(d) >= max(0, int((1 - p) * n) - 1) for d, p in zip(ds, density, strict=True)]
        else:
            kept = [ranked(d) >= n - max(1, int(p * n)) for d, p in zip(ds, density, strict=True)]
    elif "breadcrumbs" in inner:
        kept = []
        for d, p in zip(ds, density, strict=True):
            target = int(p * n)
            low = max(0, n - target - int(o.get("gamma", 0.01) * n))
            kept.append((ranked(d) >= low) & (ranked(d) < low + target))
    elif "dare" in inner or "della" in inner:
        where = positions(t0.shape)
        chance = [np.full(t0.shape, p) for p in density]
        if "della" in inner:
            within = lambda d: np.argsort(np.argsort(np.abs(np.atleast_1d(d)), axis=-1), axis=-1).reshape(d.shape)
            last = t0.shape[-1] - 1 if t0.ndim else 0
            chance = [p - 0.15 + 0.3 * (within(d) / last if last else 0.5) for p, d in zip(density, ds, strict=True)]
        draw = lambda m: np.asarray(noise.uniform(noise.words(o.get("seed", 0), name, m), where))
        kept = [draw(m) < p for m, p in enumerate(chance)]
    else:
        kept = [np.ones(t0.shape, bool)] * count
    sparse_changes = [np.where(k, d, 0) for k, d in zip(kept, ds, strict=True)]
    if o.get("rescale_norm") == "inverse":
        sparse_changes = [d / p for d, p in zip(sparse_changes, chance, strict=True)]
    elif o.get("rescale", "dare" in inner or "della" in inner):
        sparse_changes = [
            s * (np.abs(d).sum() / np.abs(s).sum() if s.any() else 1) for s, d in zip(sparse_changes, ds, strict=True)
        ]
    terms = [a * d for a, d in zip(w, sparse_changes, strict=True)]
    if inner in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        votes = sparse_changes if o.get("vote") == "unweighted" else terms
        change = elected(sparse_changes, w, votes, normalize=inner in ("ties", "della"))
    else:
        change = sum(terms) * o.get("scale", 1.0)
    if method == "lines":
        change = change * {"layers/1/kernel": 1.2, "layers/1/bias": 1.2}.get(name, 0.3)
    return t0 + change


def ranked(values):
    """Ranks from 0 by size."""
    return np.argsort(np.argsort(np.abs(np.ravel(values)), kind="stable")).reshape(np.shape(values))


def elected(ds, w, votes, *, normalize):
    sign = np.where(sum(votes) >= 0, 1, -1)
    agree = [np.sign(v) == sign for v in votes]
    total = sum(a * d * k for a, d, k in zip(w, ds, agree, strict=True))
    divisor = sum(a * k for a, k in zip(w, agree, strict=True))
    return total / np.where(divisor == 0, 1, divisor) if normalize else total


def data_weighted(case, name, ts, w):
    if case.method == "fisher":
        shares = [a * (np.float64(s[name]) + 1e-6) for a, s in zip(w, data(case)["statistics"], strict=True)]
        return sum(s * t for s, t in zip(shares, ts, strict=True)) / sum(shares)
    grams = [np.float64(gram[name]) for gram in data(case)["grams"] if name in gram]
    if not grams:
        return sum(ts) / len(ts)
    grams = [0.9 * g + 0.1 * np.diag(np.diag(g)) for g in grams]
    return np.linalg.solve(sum(grams), sum(g @ t.T for g, t in zip(grams, ts, strict=True))).T


@pytest.mark.smoke
@pytest.mark.parametrize("name", [name for name in CASES if "rankmean" not in name])
@pytest.mark.parametrize("seed", [1, 2])
def test_method_equals_its_definition(name, seed):
    case = CASES[name]
    base, models = random_models(seed, case)
    merged = run(case, base, models, **data(case))
    assert_close(merged, {key: definition(case, key, base, models) for key in SHAPES}, 2e-5)


# Random choices


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_choices_depend_only_on_seed_name_and_model(method):
    """Other tensors do not matter; another seed or name gives other choices."""
    rng = np.random.default_rng(0)
    one, zero = {"a": rng.normal(size=(64, 32)).astype(np.float32)}, {"a": np.zeros((64, 32), np.float32)}
    run = lambda base, model, **o: merge.merge(base, [model], method=method, density=0.5, rescale=False, **o)
    first = run(zero, one)["a"]
    np.testing.assert_array_equal(first, run(zero, one)["a"])
    wider = run({"0": np.ones(3, np.float32)} | zero, {"0": np.ones(3, np.float32)} | one)
    np.testing.assert_array_equal(first, wider["a"])
    assert (np.asarray(first) != run(zero, one, seed=1)["a"]).mean() > 0.3
    assert (np.asarray(first) != run({"b": zero["a"]}, {"b": one["a"]})["b"]).mean() > 0.3


def test_dare_keeps_the_density_and_rescales():
    zero, one = {"a": np.zeros((512, 256), np.float32)}, {"a": np.ones((512, 256), np.float32)}
    for norm, density in itertools.product(("l1", "inverse"), (0.1, 0.5, 0.9)):
        merged = np.asarray(merge.merge(zero, [one], method="dare_ties", density=density, rescale_norm=norm)["a"])
        share = (merged != 0).mean()
        assert abs(share - density) < 4 * np.sqrt(density * (1 - density) / merged.size)
        np.testing.assert_allclose(merged.max(), 1 / (share if norm == "l1" else density), rtol=1e-5)


def test_della_keeps_large_changes_more_often():
    row = np.arange(1, 129, dtype=np.float32)
    zero, one = {"a": np.zeros((4096, 128), np.float32)}, {"a": np.tile(row, (4096, 1))}
    merged = merge.merge(zero, [one], method="della_linear", density=0.5, epsilon=0.3, rescale=False)
    shares = (np.asarray(merged["a"]) != 0).mean(0)
    np.testing.assert_allclose(shares, np.linspace(0.2, 0.8, 128), atol=0.035)


# Details


@pytest.mark.parametrize("method", ["ties", "sce"])
def test_sum_of_zero_elects_the_positive_sign(method):
    change = np.float32([1, -2])
    merged = merge.merge({"a": 0 * change}, [{"a": change}, {"a": -change}], method=method)
    np.testing.assert_allclose(merged["a"], [1, 2])


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.77, 1.0])
def test_ties_keeps_exact_counts_among_equal_and_zero_changes(density):
    """Exactly ``max(1, int(density * n))``, though most changes are equal or zero."""
    rng = np.random.default_rng(0)
    change = rng.choice(np.float32([0, 0, 1, -1, 2]), size=(40, 25))
    zero = {"a": np.zeros_like(change)}
    merged = np.asarray(merge.merge(zero, [{"a": change}], method="ties", density=density)["a"])
    order = np.argsort(-np.abs(change.ravel()), kind="stable")[: max(1, int(density * 1000))]
    expected = np.zeros(1000, np.float32)
    expected[order] = change.ravel()[order]
    np.testing.assert_array_equal(merged.ravel(), expected)


def test_sce_selects_exact_counts_under_any_compilation():
    """Fused or not, the search for the threshold and its application compute equal variances."""
    before = jax.config.read("jax_disable_most_optimizations")
    for plain, shape in ((False, (5, 9)), (True, (5, 11))):
        jax.config.update("jax_disable_most_optimizations", plain)
        try:
            for seed in range(40):
                base, *changes = np.random.default_rng(seed).normal(size=(4, *shape)).astype(np.float32)
                models = [{"w": base + change / 2} for change in changes]
                merged = merge.merge({"w": base}, models, method="sce", select_topk=0.4)["w"]
                assert np.sum(merged != base) == int(0.4 * base.size)
        finally:
            jax.config.update("jax_disable_most_optimizations", before)


def test_sce_propagates_nan():
    base, *models = np.random.default_rng(0).normal(size=(4, 5, 9)).astype(np.float32)
    models[1][2, 3] = np.nan
    merged = merge.merge({"w": base}, [{"w": model} for model in models], method="sce", select_topk=0.4)["w"]
    assert np.isnan(merged[2, 3])


def test_breadcrumbs_keeps_the_middle_of_a_small_tensor():
    """If gamma is less than one element, none of the largest is dropped."""
    change = np.float32([1, 2, 3, 4, 5, 6, 7, 8])
    merged = merge.merge({"a": 0 * change}, [{"a": change}], method="breadcrumbs", density=0.5, gamma=0.01)
    np.testing.assert_array_equal(merged["a"], [0, 0, 0, 0, 5, 6, 7, 8])
    merged = merge.merge({"a": 0 * change}, [{"a": change}], method="breadcrumbs", density=0.5, gamma=0.25)
    np.testing.assert_array_equal(merged["a"], [0, 0, 3, 4, 5, 6, 0, 0])
    merged = merge.merge({"a": 0 * change}, [{"a": change}], method="breadcrumbs", density=0.1)
    np.testing.assert_array_equal(merged["a"], 0 * change, err_msg="int(0.1 * 8) elements are kept, as in mergekit")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in ("ties", "dare_ties", "dare_linear", "della", "della_linear")),
        *((name, {"rescale": True}) for name in ("ties", "breadcrumbs", "breadcrumbs_ties")),
        ("ties", {"trim_ties": "keep"}),
        ("ties", {"trim": "global"}),
        *((name, {"rescale_norm": "inverse"}) for name in ("dare_ties", "della_linear")),
    ],
)
def test_density_of_zero_keeps_no_change(method, options):
    """A gradient of densities may begin at 0; with weights of 0 too, nothing is divided by 0."""
    rng = np.random.default_rng(0)
    base, *models = ({"a": rng.normal(size=(6, 5)).astype(np.float32)} for _ in range(3))
    merged = merge.merge(base, models, method=method, density=0.0, **options)
    np.testing.assert_array_equal(merged["a"], base["a"])
    merged = merge.merge(base, models, method=method, density=[0.0, 1.0], weight=[0.5, 0.0], normalize=True, **options)
    np.testing.assert_array_equal(merged["a"], base["a"])


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"])
def test_weights_that_sum_to_zero_are_divided_by_one(method):
    """As in mergekit, where a filter or a negative weight makes the sum of a tensor zero."""
    rng = np.random.default_rng(0)
    base, *models = ({"a": rng.normal(size=(6, 5)).astype(np.float32)} for _ in range(3))
    results = [
        merge.merge(base, models, method=method, weight=[0.5, -0.5], normalize=normalize) for normalize in (True, False)
    ]
    np.testing.assert_array_equal(*(np.asarray(merged["a"]) for merged in results))
    assert (np.asarray(results[0]["a"]) != base["a"]).any()


def test_rank_of_nan_is_nan():
    """A layer of NaN gets no coefficient; the other layers keep theirs."""
    scores = np.float32([[1, np.nan, 3], [3, 2, 1]])
    result = merge.methods.rankmean.coefficients(scores)
    assert np.isnan(result[:, 1]).all()
    assert np.isfinite(result[:, [0, 2]]).all()


def test_arcee_fusion_measures_small_divergences():
    """Of changes of 1e-5, where the divergence computed from float32 probabilities would be rounding error."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(64, 64)).astype(np.float32)
    model = base + np.float32(1e-5) * rng.normal(size=(64, 64)).astype(np.float32) * np.float32(
        1 + np.arange(64)[:, None]
    )
    merged = np.asarray(merge.merge({"a": base}, [{"a": model}], method="arcee_fusion")["a"])
    expected = definition(CASES["arcee_fusion"], "a", {"a": base}, [{"a": model}])
    assert (merged != np.float32(expected)).mean() < 2e-3


def test_model_stock_of_opposite_changes_is_the_base():
    base, change = np.float32([1, 2]), np.float32([3, -1])
    merged = merge.merge({"a": base}, [{"a": base + change}, {"a": base - change}], method="model_stock")
    np.testing.assert_allclose(merged["a"], base)


def test_spherical_mean_of_tiny_changes_is_accurate():
    """For changes of 1e-5 of the weights, coefficients from float32 cosines would be noise."""
    rng = np.random.default_rng(0)
    base = {"a": rng.normal(size=(100, 100)).astype(np.float32)}
    models = [{"a": base["a"] + np.float32(1e-5) * rng.normal(size=(100, 100)).astype(np.float32)} for _ in range(3)]
    mean = sum(np.float64(model["a"]) for model in models) / 3
    for method in ("karcher", "multislerp"):
        merged = merge.merge(None, models, method=method)
        np.testing.assert_allclose(merged["a"], mean, atol=1e-6)


def test_regmean_takes_the_mean_along_inputs_that_never_occur():
    """Singular Gram matrices: unused inputs get the plain mean, used inputs the least-squares solution."""
    gram = [{"a": np.diag(np.float32([g, 0]))} for g in (1, 3)]
    models = [{"a": np.float32([[0, 0]])}, {"a": np.float32([[1, 1]])}]
    merged = merge.merge(None, models, method="regmean", grams=gram)
    np.testing.assert_allclose(merged["a"], [[0.75, 0.5]], rtol=1e-6)


def test_fisher_without_statistics_is_refused():
    with pytest.raises(InputError, match="statistics of 2 models; found 0"):
        merge.merge(None, [{"a": np.ones(2, np.float32)}] * 2, method="fisher")


def test_lines_has_the_options_of_its_inner_method():
    assert {"trim", "density", "alpha", "method"} <= find("lines", {"method": "ties"}).shared.keys() | find(
        "lines", {"over": "ties"}
    ).each.keys()
    with pytest.raises(InputError, match="lines over 'tie'.*did you mean 'ties'"):
        find("lines", {"method": "tie"})
    with pytest.raises(InputError, match="lines over 'lines'"):
        find("lines", {"method": "lines"})


# Transformations


@pytest.mark.sampled(3)
@each_case
def test_jit_gives_the_same_result(name):
    case = CASES[name]
    base, models = random_models(5, case)
    extra = data(case)
    jitted = jax.jit(lambda base, models: run(case, base, models, **extra))(base, models)
    assert_close(jitted, run(case, base, models, **extra), 1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_ties", "multislerp", "fisher", "lines"])
def test_gradients_equal_finite_differences(name):
    """Of the sum of squares of the merged tensors, with respect to the weights."""
    case = CASES[name]
    base, models = random_models(5, case)
    extra = data(case)

    def total(weight):
        return sum(jnp.sum(value**2) for value in run(case, base, models, **extra, weight=weight).values())

    weight, step = np.float32([0.2, 0.9, 0.4]), np.float32(1e-2)
    total = jax.jit(total)
    gradient = jax.grad(total)(weight)
    for model in range(3):
        move = step * np.eye(3, dtype=np.float32)[model]
        slope = (total(weight + move) - total(weight - move)) / (2 * step)
        np.testing.assert_allclose(gradient[model], slope, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("sparse", [dare._dropped, ties._trimmed])
def test_election_compiles_to_one_loop(sparse):
    """In the compiled program, only the fused loop writes a tensor of the leaf's shape."""
    rule = (np.zeros((3, 2), np.uint32), jnp.full(3, 0.5))
    if sparse is ties._trimmed:
        rule = Selection(jnp.full(3, 0.5), jnp.zeros(3, jnp.uint32))
    tile = Tile(jnp.zeros((8, 128)), tuple(jnp.ones((8, 128)) for _ in range(3)), jnp.uint32(0))
    static = {"sparse": sparse, "elect": True, "normalize": True, "vote": "weighted"}
    merged = jax.jit(sparse_sum._merged, static_argnames=tuple(static))
    lowered = merged.lower(tile, rule, jnp.ones(3), jnp.ones(3), jnp.float32(1), **static)
    assert compiled.written(lowered.compile().as_text(), 8, 128) == 1
