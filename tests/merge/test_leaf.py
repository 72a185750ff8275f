"""Leaves: folds over tensors, and positions of elements."""

import jax.numpy as jnp
import numpy as np

from merge.leaf import Whole, fold_all, positions


def test_fold_all_returns_folds_in_the_order_of_the_leaves():
    leaves = [Whole(str(number), None, (np.full(number, number, np.float32),)) for number in (3, 1, 2)]
    assert [float(sums) for sums in fold_all(leaves, total)] == [9, 1, 4]


def total(tile):
    return jnp.sum(tile.models[0])


def test_positions_are_row_major_from_the_start():
    np.testing.assert_array_equal(positions((2, 3), 5), [[5, 6, 7], [8, 9, 10]])
    np.testing.assert_array_equal(positions((2,), np.uint32(0xFFFFFFFF)), np.uint32([0xFFFFFFFF, 0]))
