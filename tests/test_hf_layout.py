"""Layouts of params in tensors of files: literals, and both directions."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsee_jax import hf_layout
from dsee_jax.hf_layout import KERNEL, PLAIN, Layout

ADJACENT = tuple(Layout(part=part, parts=3) for part in range(3))
ALTERNATING = tuple(Layout(True, part, 3, 2) for part in range(3))


@pytest.mark.parametrize("layouts", [(PLAIN,), (KERNEL,), ADJACENT, ALTERNATING, ALTERNATING[::-1]])
@pytest.mark.parametrize("shape", [(4,), (5, 4)])
def test_to_ours_inverts_to_hf(layouts, shape):
    """The tensor has the shape of `stored_shape`, and every param is recovered from the tensor."""
    arrays = [np.random.default_rng(number).normal(size=shape) for number in range(len(layouts))]
    tensor = hf_layout.to_hf(layouts, arrays)
    assert tensor.shape == hf_layout.stored_shape(layouts[0], shape)
    for each, array in zip(layouts, arrays, strict=True):
        np.testing.assert_array_equal(hf_layout.to_ours(each, tensor), array)


def test_adjacent_parts():
    """Three adjacent kernels (in, out), not transposed."""
    tensor = np.arange(12).reshape(2, 6)
    params = [hf_layout.to_ours(each, tensor).tolist() for each in ADJACENT]
    assert params == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert hf_layout.to_ours(ADJACENT[1], np.arange(6)).tolist() == [2, 3]


def test_alternating_parts():
    """Rows (out, in): two of each of the three parts per head."""
    tensor = np.arange(12)[:, None]
    params = [hf_layout.to_ours(each, tensor).tolist() for each in ALTERNATING]
    assert params == [[[0, 1, 6, 7]], [[2, 3, 8, 9]], [[4, 5, 10, 11]]]


def test_single_param_is_a_view():
    """A single param is not copied in either direction."""
    array = np.zeros((2, 3))
    for each in (PLAIN, KERNEL):
        assert np.shares_memory(hf_layout.to_ours(each, array), array)
        assert np.shares_memory(hf_layout.to_hf([each], [array]), array)


@hypothesis.given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_outputs_are_the_columns_of_a_part(turns, parts, block):
    """All parts together have every column once."""
    layouts = [Layout(False, part, parts, block) for part in range(parts)]
    size = turns * parts * block
    tensor = np.random.default_rng(0).normal(size=(2, size))
    for each in layouts:
        np.testing.assert_array_equal(tensor[:, hf_layout.outputs(each, size)], hf_layout.to_ours(each, tensor))
    assert sorted(np.concatenate([hf_layout.outputs(each, size) for each in layouts])) == [*range(size)]
    assert not hf_layout.outputs(Layout(True, 0, parts + 1, size), size).size


def test_block_is_read_from_the_config():
    """The block may be the name of a config attribute, or a number."""

    class Config:
        head_size = 7

    assert hf_layout.resolved(Layout(True, 1, 3, "head_size"), Config) == Layout(True, 1, 3, 7)
    assert hf_layout.resolved(KERNEL, Config) == KERNEL
