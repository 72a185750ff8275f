"""In-memory merging: against the RankMean authors' outputs, and the invariants the method promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import merge
from dsee_jax.errors import InputError

GOLDENS = [
    ("rankmean", {"method": "rankmean", "unit": "layer"}),
    ("finer_grained", {"method": "rankmean", "unit": "tensor"}),
    ("reversed", {"method": "rankmean", "unit": "layer", "order": "reversed"}),
    ("average_merging", {"method": "linear"}),
    ("task_arithmetic", {"method": "task_arithmetic", "scale": 0.7}),
]


@pytest.mark.parametrize(("name", "options"), GOLDENS)
def test_equals_the_outputs_of_the_authors_code(shared, name, options):
    folder = shared / "goldens" / "rankmean"
    base, a, b = (load_file(folder / part / "model.safetensors") for part in ("base", "model_a", "model_b"))
    expected = load_file(folder / f"expected_{name}.safetensors")
    merged = merge.merge(base, [a, b], **options)
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(merged[key], value, rtol=1e-6, atol=1e-6 * np.abs(value).max())


def models(seed: int, count: int, layers: int = 3) -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(seed)

    def model():
        layer = lambda: {"query": {"kernel": rng.normal(size=(3, 2)).astype(np.float32)}}
        return {
            "embeddings": {"word": rng.normal(size=(4, 3)).astype(np.float32)},
            "encoder": {f"layer_{i}": layer() for i in range(layers)},
        }

    return model(), [model() for _ in range(count)]


def test_literal_ranks_give_literal_coefficients():
    base = {f"layer_{i}": {"kernel": np.zeros(1, np.float32)} for i in range(3)}
    grow = lambda *sizes: {f"layer_{i}": {"kernel": np.float32([s])} for i, s in enumerate(sizes)}
    found = merge.rankmean_coefficients(base, [grow(1, 2, 3), grow(9, -5, 1)])
    np.testing.assert_allclose([found[u] for u in "012"], [[1 / 4, 3 / 4], [1 / 2, 1 / 2], [3 / 4, 1 / 4]])
    tied = merge.rankmean_coefficients(base, [grow(1, 1, 3), grow(1, 2, 3)])
    np.testing.assert_allclose(tied["0"], [1.5 / 2.5, 1 / 2.5])
    ordered = merge.rankmean_coefficients(base, [grow(1, 1, 3), grow(1, 2, 3)], ties="order")
    np.testing.assert_allclose([ordered[u] for u in "012"], [[1 / 2, 1 / 2]] * 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.01, 100), st.sampled_from(["ascending", "reversed"]))
def test_invariants_of_the_coefficients(seed, count, factor, order):
    base, tuned = models(seed, count)
    found = merge.rankmean_coefficients(base, tuned, order=order)
    scaled = jax.tree.map(lambda b, t: b + np.float32(factor) * (t - b), base, tuned[0])
    again = merge.rankmean_coefficients(base, [scaled, *tuned[1:]], order=order)
    swapped = merge.rankmean_coefficients(base, tuned[::-1], order=order)
    for unit, share in found.items():
        np.testing.assert_allclose(np.sum(share), 1, rtol=1e-6)
        np.testing.assert_allclose(share, again[unit], rtol=1e-6)
        np.testing.assert_allclose(share, swapped[unit][::-1], rtol=1e-6)
        if count == 2:
            assert 1 / 4 - 1e-6 <= float(share[0]) <= 3 / 4 + 1e-6


@pytest.mark.parametrize("method", merge.METHODS)
def test_copies_of_one_model_merge_to_it_under_jit(method):
    base, (model,) = models(0, 1)
    options = {"normalize": True} if method == "task_arithmetic" else {}
    merged = jax.jit(lambda b, m: merge.merge(b, [m] * 3, method=method, **options))(base, model)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, model)


def test_gradients_flow_through_given_coefficients():
    base, tuned = models(0, 2)
    shares = merge.rankmean_coefficients(base, tuned)
    total = lambda c: jnp.sum(
        merge.merge(base, tuned, method="rankmean", coefficients=c)["encoder"]["layer_0"]["query"]["kernel"]
    )
    gradient = jax.grad(total)(shares)
    np.testing.assert_allclose(
        gradient["0"], [np.sum(t["encoder"]["layer_0"]["query"]["kernel"]) for t in tuned], rtol=1e-5
    )


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
        merge.merge(base, tuned, method="linear", weights=[1.0])
