"""Streamed merges equal the RankMean authors' code and mergekit 0.1.5, whose recipes run unmodified."""

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import checkpoints
from merge import __main__ as command

AUTHORS = {
    "rankmean": ("rankmean", {"unit": "layer"}),
    "finer_grained": ("rankmean", {"unit": "tensor"}),
    "reversed": ("rankmean", {"order": "reversed"}),
    "average_merging": ("linear", {"weight": 1}),
    "task_arithmetic": ("task_arithmetic", {"weight": 1, "lambda": 0.7}),
    "ties_merging": ("ties", {"weight": 1, "density": 0.2, "trim": "global", "trim_ties": "keep"}),
}


def equal(merged, expected):
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-6 * np.abs(value).max(), err_msg=name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", AUTHORS)
def test_streamed_merge_equals_the_authors_code(shared, tmp_path, name):
    folder = shared / "goldens" / "rankmean"
    method, parameters = AUTHORS[name]
    fields = {"merge_method": method, "parameters": parameters, "models": []}
    fields["models"] = [{"model": str(folder / model)} for model in ("model_a", "model_b")]
    if method != "linear":
        fields["base_model"] = str(folder / "base")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(fields))
    assert command.main([str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    equal(checkpoints.load(tmp_path / "out"), load_file(folder / f"expected_{name}.safetensors"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["linear", "linear_slices", "slerp", "task_arithmetic", "ties"])
def test_streamed_merge_equals_mergekit(shared, tmp_path, name):
    folder = shared / "goldens" / "mergekit"
    assert command.main([str(folder / f"{name}.yml"), str(tmp_path / "out")]) == 0
    equal(checkpoints.load(tmp_path / "out"), load_file(folder / f"{name}.safetensors"))
