"""safetensors files: sizes, and strided views."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError


def test_strided_views_are_written_in_order(tmp_path):
    """safetensors 0.8.0 by itself silently writes the memory behind a transposed or strided view."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    views = {"transposed": array.T, "strided": array[:, ::2], "reversed": array[::-1]}
    tensors.write(tmp_path, views)
    tensors.save(tmp_path / "saved.safetensors", views, {"format": "pt"})
    for file in ("model.safetensors", "saved.safetensors"):
        arrays, stored = load_file(tmp_path / file), tensors.contents(tmp_path / file)
        for name, view in views.items():
            np.testing.assert_array_equal(arrays[name], view)
            np.testing.assert_array_equal(tensors.read(stored[name]), view)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), limit=st.integers(1, 200))
def test_shards_stay_below_the_limit(tmp_path_factory, sizes, limit):
    """Every array is read back; a shard is within the limit or holds one array."""
    folder = tmp_path_factory.mktemp("shards")
    arrays = {f"a{number}": np.full(size, number, np.float32) for number, size in enumerate(sizes)}
    tensors.write(folder, arrays, max_shard_size=limit)
    stored = tensors.index(folder)
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors.read(stored[name]), array)
    for file in {where.file for where in stored.values()}:
        sizes = [where.nbytes for where in stored.values() if where.file == file]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) <= 1


def test_byte_size_is_parsed():
    """Powers of 1000, as Hugging Face counts."""
    assert [tensors.byte_size(text) for text in ("5GB", "500 mb", "1.5KB", 7, "12")] == [
        5 * 10**9,
        500 * 10**6,
        1500,
        7,
        12,
    ]
    for bad in ("", "big", "-1GB", "5XB", 0, "9" * 400 + "GB"):
        with pytest.raises(InputError, match="is not a size"):
            tensors.byte_size(bad)


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_that_are_not_finite_are_found(kind):
    """Anywhere in an array of several parts; extreme numbers are finite."""
    info = ml_dtypes.finfo(kind)
    array = np.zeros((3, 1 << 19), kind)
    array[0, :5] = info.max, info.min, info.smallest_subnormal, -info.tiny, -0.0
    assert tensors.finite(array)
    assert tensors.finite(array[:0])
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        for place in ((0, 0), (1, 9), (2, -1)):
            array[place], kept = value, array[place]
            assert not tensors.finite(array), (value, place)
            array[place] = kept
