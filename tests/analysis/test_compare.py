"""Comparisons of two checkpoints: every figure on matrices with a known answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tiny
from dsee_jax.analysis import compare
from dsee_jax.errors import InputError


@given(rank=st.integers(1, 6), size=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_effective_rank_of_equal_singular_values_is_their_number(rank, size, seed):
    """For any size of the values and any shape of the matrix."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.normal(size=(side, rank)))[0] for side in (9, 7))
    assert compare.effective_rank(size * left @ right.T) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_of_unequal_values():
    """Shares 3/4 and 1/4: exp of their entropy; 0 for a matrix of zeros."""
    assert compare.effective_rank(np.diag([3.0, 1.0, 0.0])) == pytest.approx(4 / 3**0.75)
    assert compare.effective_rank(np.zeros((3, 2))) == 0


@pytest.fixture
def pair(tmp_path):
    """A checkpoint of two layers, and one with the query of layer 0 tripled and half of its key set to 0."""
    before, after = (tiny.bert(tmp_path / name) for name in ("before", "after"))
    tensors = load_file(after / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.query.weight"] *= 3
    tensors["bert.encoder.layer.0.attention.self.key.weight"][:12] = 0
    del tensors["classifier.bias"]
    save_file(tensors, after / "model.safetensors")
    return before, after


def test_figures_of_known_changes(pair):
    comparison = compare.compare(*pair)
    rows = {row["name"].removeprefix("bert.encoder.layer.0.attention.self."): row for row in comparison["tensors"]}
    assert rows["query.weight"]["change"] == pytest.approx(2.0)
    assert rows["query.weight"]["sparsity"] == 0
    before = load_file(pair[0] / "model.safetensors")
    query = before["bert.encoder.layer.0.attention.self.query.weight"]
    assert rows["query.weight"]["effective_rank"] == pytest.approx(compare.effective_rank(query))
    assert rows["key.weight"]["sparsity"] == rows["key.weight"]["zeros"] == 0.5
    assert rows["value.weight"] == {"change": 0, "sparsity": 1, "zeros": 0, "effective_rank": 0, "size": 576} | {
        "name": rows["value.weight"]["name"]
    }
    assert [row["layer"] for row in comparison["layers"]] == ["0", "1", "other"]
    assert sum(row["size"] for row in comparison["layers"]) == sum(row["size"] for row in comparison["tensors"])
    first, second, other = comparison["layers"]
    assert 0 < first["change"] < 1
    assert (second["change"], other["sparsity"]) == (0, 1)
    assert (comparison["only_before"], comparison["only_after"]) == (["classifier.bias"], [])


def test_tensor_of_zeros_has_no_relative_change(tmp_path):
    for name, value in (("before", 0.0), ("after", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": np.full((2, 3), value, np.float32)}, tmp_path / name / "model.safetensors")
    (row,) = compare.compare(tmp_path / "before", tmp_path / "after")["tensors"]
    assert row["change"] is None
    assert row["effective_rank"] == pytest.approx(1.0)


def test_other_architecture_is_refused(tmp_path, pair):
    wide = tiny.bert(tmp_path / "wide", hidden_size=27)
    with pytest.raises(InputError, match=r"is \(\d+,.*not one architecture"):
        compare.compare(pair[0], wide)
    (tmp_path / "other").mkdir()
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(InputError, match="no tensor of one name"):
        compare.compare(pair[0], tmp_path / "other")


def test_bare_model_matches_a_model_with_a_prefix(tmp_path):
    """A bare encoder lacks ``bert.``: its tensors match those of a classifier, in both orders."""
    bare, full = tiny.bert(tmp_path / "bare", prefix=False), tiny.bert(tmp_path / "full")
    for before, after in ((bare, full), (full, bare)):
        comparison = compare.compare(before, after)
        assert comparison["only_before"] == comparison["only_after"] == []
        assert all(row["sparsity"] == 1 for row in comparison["tensors"])


def test_values_that_are_not_finite_and_empty_tensors_are_compared():
    assert np.isnan(compare.effective_rank(np.full((3, 4), np.nan, np.float32)))
    assert np.isnan(compare.effective_rank(np.full((3, 4), np.inf, np.float32)))


def test_empty_tensor_is_left_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        arrays = {"w.weight": np.ones((2, 2), np.float32), "none.weight": np.zeros((0, 2), np.float32)}
        save_file(arrays, tmp_path / name / "model.safetensors")
    rows = compare.compare(tmp_path / "a", tmp_path / "b")["tensors"]
    assert [row["name"] for row in rows] == ["w.weight"]
