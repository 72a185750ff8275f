"""Lazy tensors: every range that is read equals that range of the whole array."""

import pathlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from merge.inputs import lazy

HERE = pathlib.Path("adapter.safetensors")
RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.normal(size=(5, 7)).astype(np.float32)


def in_memory(array, dtype="F32"):
    flat = array.ravel()
    return lazy.Lazy(array.shape, dtype, (HERE,), array.nbytes, lambda start, stop: flat[start:stop])


def read_every_range(lazy):
    """Check that every range equals that range of the whole tensor, and return the whole tensor."""
    size = int(np.prod(lazy.shape))
    whole = lazy.read(0, size)
    assert whole.shape == (size,)
    assert whole.dtype == np.dtype(tensors.DTYPES[lazy.dtype])
    for start in range(size + 1):
        for stop in range(start, size + 1):
            np.testing.assert_array_equal(lazy.read(start, stop), whole[start:stop])
    return whole.reshape(lazy.shape)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int64, np.bool_])
def test_plain_reads_the_tensor_of_the_file(tmp_path, dtype):
    array = (MATRIX * 4).astype(dtype)
    save_file({"other": np.ones(3, np.int8), "x": array}, tmp_path / "model.safetensors")
    tensor = lazy.plain(tensors.index(tmp_path)["x"])
    np.testing.assert_array_equal(read_every_range(tensor), array)
    assert (tensor.shape, tensor.nbytes, tensor.files) == ((5, 7), array.nbytes, (tmp_path / "model.safetensors",))


def test_scalar_and_empty_tensor_are_read(tmp_path):
    """An empty tensor has no bytes to map."""
    save_file({"one": np.array(3.0), "none": np.empty((0, 4), np.float32)}, tmp_path / "model.safetensors")
    stored = tensors.index(tmp_path)
    assert lazy.plain(stored["one"]).read(0, 1).tolist() == [3.0]
    assert lazy.plain(stored["none"]).read(0, 0).shape == (0,)


def test_file_truncated_after_opening_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(100_000, np.float32)}, path)
    tensor = lazy.plain(tensors.index(tmp_path)["x"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="ends early"):
        tensor.read(90_000, 100_000)


def test_adapted_applies_mask_product_and_sparse_values():
    """The order is: mask the weight, add the product, add the sparse values."""
    base = in_memory(np.array([[1, 2], [3, 4], [5, 6]], np.float16), "F16")
    left, right = np.array([[1], [0], [2]], np.float32), np.array([[10, 20]], np.float32)
    kept = np.packbits(np.array([1, 0, 1, 1, 1, 1], bool))
    sparse = np.array([2, 5]), np.array([0.5, 0.25], np.float32)
    tensor = lazy.adapted(base, HERE, factors=(left, right), sparse=sparse, kept=kept)
    assert read_every_range(tensor).tolist() == [[11, 20], [3.5, 4], [25, 46.25]]
    assert (tensor.dtype, tensor.files) == ("F32", (HERE, HERE))


def test_aligned_moves_fills_and_pads_rows():
    """Rows are moved, taken from another model, averaged, or zero; padding is the mean of all rows."""
    ours, theirs = np.arange(6, dtype=np.float32).reshape(3, 2), np.array([[10, 20], [30, 40]], np.float32)
    mine, other = in_memory(ours), in_memory(theirs)
    fills = {1: [(other, 1)], 3: [(mine, 0), (other, 0)]}
    tensor = lazy.aligned(mine, np.array([2, -1, 0, -1, -1, -1]), fills, 5)
    rows = [[4, 5], [30, 40], [0, 1], [5, 10.5], [0, 0]]
    assert read_every_range(tensor).tolist() == [*rows, pytest.approx(np.mean(rows, axis=0))]
    assert tensor.shape == (6, 2)


def test_aligned_vectors_have_rows_of_one_element():
    tensor = lazy.aligned(in_memory(np.array([5, 6, 7], np.float32)), np.array([1, 2, -1, 0]), {}, 4)
    assert read_every_range(tensor).tolist() == [6, 7, 0, 5]


def test_aligned_keeps_the_type_only_if_rows_are_moved():
    low, high = in_memory(MATRIX.astype(np.float16), "F16"), in_memory(MATRIX)
    rows = np.array([1, -1])
    assert lazy.aligned(low, rows, {1: [(low, 0)]}, 2).dtype == "F16"
    assert lazy.aligned(low, rows, {1: [(high, 0)]}, 2).dtype == "F32"
    assert lazy.aligned(low, rows, {1: [(low, 0), (low, 1)]}, 2).dtype == "F32"
    assert lazy.aligned(low, rows, {}, 1).dtype == "F32"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=12), st.data())
def test_aligned_equals_numpy_indexing(rows, data):
    """Rows in any order, with repeats and missing rows."""
    rows = np.array(rows, np.int64)
    tensor = lazy.aligned(in_memory(MATRIX), rows, {}, len(rows))
    expected = np.where(rows[:, None] < 0, 0, MATRIX[rows]).astype(np.float32).ravel()
    start = data.draw(st.integers(0, expected.size))
    stop = data.draw(st.integers(start, expected.size))
    np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
