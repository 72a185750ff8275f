"""In-memory merges equal the RankMean authors' code and mergekit 0.1.5."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import merge


def equal(merged, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-6 * np.abs(value).max(), err_msg=name)


@pytest.fixture
def trees(shared):
    folder = shared / "goldens" / "rankmean"
    return [load_file(folder / part / "model.safetensors") for part in ("base", "model_a", "model_b")]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rankmean", {"method": "rankmean", "unit": "layer"}),
        ("finer_grained", {"method": "rankmean", "unit": "tensor"}),
        ("reversed", {"method": "rankmean", "unit": "layer", "order": "reversed"}),
        ("average_merging", {"method": "linear"}),
        ("task_arithmetic", {"method": "task_arithmetic", "scale": 0.7}),
        ("ties_merging", {"method": "ties", "density": 0.2, "trim": "global", "trim_ties": "keep"}),
    ],
)
def test_equals_the_authors_code(shared, trees, name, options):
    expected = load_file(shared / "goldens" / "rankmean" / f"expected_{name}.safetensors")
    merged = merge.merge(trees[0], trees[1:], **options)
    assert merged.keys() == expected.keys()
    equal(merged, expected)


def test_linear_task_arithmetic_and_ties_equal_mergekit(shared, trees):
    folder, (base, a, b) = shared / "goldens" / "mergekit", trees
    equal(merge.merge(None, [a, b], method="linear", weight=[0.3, 0.9]), load_file(folder / "linear.safetensors"))
    merged = merge.merge(base, [a, b], method="task_arithmetic", weight=[0.6, 0.7], scale=0.8)
    equal(merged, load_file(folder / "task_arithmetic.safetensors"))
    merged = merge.merge(base, [a, b], method="ties", weight=[0.5, 0.8], density=[0.3, 0.6])
    equal(merged, load_file(folder / "ties.safetensors"))


def test_slerp_at_one_half_equals_mergekit(shared, trees):
    _, a, b = trees
    expected = load_file(shared / "goldens" / "mergekit" / "slerp.safetensors")
    half = {name: value for name, value in expected.items() if "self_attn" not in name and "mlp" not in name}
    assert {"layers" in name for name in half} == {True, False}
    merged = merge.merge({name: a[name] for name in half}, [{name: b[name] for name in half}], method="slerp", t=0.5)
    equal(merged, half)
