"""How params stand in tensors of files: each layout by literals, and there and back."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsee_jax import hf_layout
from dsee_jax.hf_layout import KERNEL, PLAIN, Layout

SIDE_BY_SIDE = tuple(Layout(part=part, parts=3) for part in range(3))
IN_TURN = tuple(Layout(True, part, 3, 2) for part in range(3))


@pytest.mark.parametrize("layouts", [(PLAIN,), (KERNEL,), SIDE_BY_SIDE, IN_TURN, IN_TURN[::-1]])
@pytest.mark.parametrize("shape", [(4,), (5, 4)])
def test_there_and_back(layouts, shape):
    """The tensor has the shape it is said to have, and every param comes back from it."""
    arrays = [np.random.default_rng(number).normal(size=shape) for number in range(len(layouts))]
    found = hf_layout.to_hf(layouts, arrays)
    assert found.shape == hf_layout.stored_shape(layouts[0], shape)
    for each, array in zip(layouts, arrays, strict=True):
        np.testing.assert_array_equal(hf_layout.to_ours(each, found), array)


def test_side_by_side():
    """Three kernels (in, out), one beside the other, not transposed."""
    tensor = np.arange(12).reshape(2, 6)
    found = [hf_layout.to_ours(each, tensor).tolist() for each in SIDE_BY_SIDE]
    assert found == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert hf_layout.to_ours(SIDE_BY_SIDE[1], np.arange(6)).tolist() == [2, 3]


def test_in_turn():
    """Rows (out, in): two of the first, two of the second, two of the third, and again for the next head."""
    tensor = np.arange(12)[:, None]
    found = [hf_layout.to_ours(each, tensor).tolist() for each in IN_TURN]
    assert found == [[[0, 1, 6, 7]], [[2, 3, 8, 9]], [[4, 5, 10, 11]]]


def test_a_view_where_there_is_one():
    """One param in one tensor is not copied in either direction."""
    array = np.zeros((2, 3))
    for each in (PLAIN, KERNEL):
        assert np.shares_memory(hf_layout.to_ours(each, array), array)
        assert np.shares_memory(hf_layout.to_hf([each], [array]), array)


@hypothesis.given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_outputs_are_the_columns_of_a_part(turns, parts, block):
    """All parts together take every column once."""
    layouts = [Layout(False, part, parts, block) for part in range(parts)]
    size = turns * parts * block
    tensor = np.random.default_rng(0).normal(size=(2, size))
    for each in layouts:
        np.testing.assert_array_equal(tensor[:, hf_layout.outputs(each, size)], hf_layout.to_ours(each, tensor))
    assert sorted(np.concatenate([hf_layout.outputs(each, size) for each in layouts])) == [*range(size)]
    assert not hf_layout.outputs(Layout(True, 0, parts + 1, size), size).size


def test_the_config_says_the_block():
    """By the name of an attribute; a number stays."""

    class Config:
        head_size = 7

    assert hf_layout.resolved(Layout(True, 1, 3, "head_size"), Config) == Layout(True, 1, 3, 7)
    assert hf_layout.resolved(KERNEL, Config) == KERNEL
