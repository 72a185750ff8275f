"""Checkpoints through Orbax: what is saved comes back, in this process and in the next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax.ckpt import checkpoints

MASKS = {"x": {"kernel": np.array([[True, False], [False, True]])}}


def numbered(number):
    return {"count": jnp.int32(number), "tree": {"w": jnp.full((2, 3), number, jnp.float32)}}


@pytest.mark.parametrize("masks", [{}, MASKS])
def test_the_newest_comes_back_in_another_process(tmp_path, masks):
    """State, masks and record, through a store that has not written them itself."""
    with checkpoints.opened(tmp_path) as store:
        assert checkpoints.latest(store) is None
        checkpoints.save(store, 0, numbered(0), {}, {"step": 0})
        checkpoints.save(store, 7, numbered(7), masks, {"step": 7, "best": None, "loss": 0.1})
    with checkpoints.opened(tmp_path) as store:
        record, found = checkpoints.latest(store)
        assert record == {"step": 7, "best": None, "loss": 0.1}
        assert jax.tree.structure(found) == jax.tree.structure(masks)
        jax.tree.map(np.testing.assert_array_equal, found, masks)
        assert all(leaf.dtype == bool for leaf in jax.tree.leaves(found))
        restored = checkpoints.restore(store, jax.tree.map(jnp.zeros_like, numbered(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, numbered(7))
        assert restored["count"].dtype == jnp.int32


def test_the_best_is_kept_while_later_ones_are_saved(tmp_path):
    with checkpoints.opened(tmp_path) as store:
        checkpoints.save_best(store, 2, numbered(2))
        for mark in range(2, 9):
            checkpoints.save(store, mark, numbered(mark), {}, {"best": 2})
        store.last.wait_until_finished()
        assert checkpoints.latest(store)[0] == {"best": 2}
        assert store.last.all_steps() == [7, 8]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_best(store, 2, numbered(0)), numbered(2))


def test_the_best_that_a_checkpoint_refers_to_is_there(tmp_path):
    """After every save of a new best, whatever instant the run dies at, the newest checkpoint's best can be read."""
    with checkpoints.opened(tmp_path) as store:
        for mark in range(1, 6):
            checkpoints.save_best(store, mark, numbered(mark))
            if mark > 1:
                store.best.wait_until_finished()
                assert checkpoints.latest(store)[0]["best"] in store.best.all_steps()
            checkpoints.save(store, mark, numbered(mark), {}, {"best": mark})


def test_what_exists_is_left_as_it_is(tmp_path):
    """A resumed run comes by marks that it has written before."""
    with checkpoints.opened(tmp_path) as store:
        for number in (1, 2):
            checkpoints.save_best(store, 1, numbered(number))
            checkpoints.save(store, 1, numbered(number), {}, {"number": number})
            store.last.wait_until_finished()
        assert checkpoints.latest(store)[0] == {"number": 1}
        assert int(checkpoints.restore(store, numbered(0))["count"]) == 1
        assert int(checkpoints.restore_best(store, 1, numbered(0))["count"]) == 1
