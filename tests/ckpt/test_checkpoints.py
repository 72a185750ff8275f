"""Checkpoints through Orbax: what is saved comes back, in this process and in the next."""

import contextlib
import functools
import gc
import pathlib
import resource
import shutil
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax.ckpt import checkpoints
from dsee_jax.errors import InputError
from dsee_jax.runtime.storage import StoreError

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
            checkpoints.save(store, mark, numbered(mark), {}, {"best": {"mark": 2}})
        store.last.wait_until_finished()
        assert checkpoints.latest(store)[0] == {"best": {"mark": 2}}
        assert store.last.all_steps() == [7, 8]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_best(store, 2, numbered(0)), numbered(2))


def test_the_best_that_a_checkpoint_refers_to_is_there(tmp_path):
    """After every save of a new best, whatever instant the run dies at, the newest checkpoint's best can be read."""
    with checkpoints.opened(tmp_path) as store:
        for mark in range(1, 6):
            checkpoints.save_best(store, mark, numbered(mark))
            if mark > 1:
                store.best.wait_until_finished()
                assert checkpoints.latest(store)[0]["best"]["mark"] in store.best.all_steps()
            checkpoints.save(store, mark, numbered(mark), {}, {"best": {"mark": mark}})


def test_a_best_of_steps_that_are_done_again_is_dropped(tmp_path):
    """A run that dies between the save of its best and of its state may find another best at this step."""
    with checkpoints.opened(tmp_path) as store:
        checkpoints.save(store, 0, numbered(0), {}, {})
        checkpoints.save_best(store, 4, numbered(1))
    with checkpoints.opened(tmp_path) as store:
        checkpoints.save_best(store, 4, numbered(2))
        assert int(checkpoints.restore_best(store, 4, numbered(0))["count"]) == 2


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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of two checkpoints, each with a best of its own."""
    folder = tmp_path_factory.mktemp("two")
    with checkpoints.opened(folder) as store:
        for mark in (1, 2):
            checkpoints.save_best(store, mark, numbered(mark))
            checkpoints.save(store, mark, numbered(mark), MASKS, {"step": mark, "best": {"mark": mark}})
    return folder


def flip(path: pathlib.Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    return max(folder.rglob(pattern), key=lambda path: path.is_file() and path.stat().st_size)


DAMAGES = {
    "an array file has a flipped bit": lambda last, best: flip(data(last, "state/d/*")),
    "an array file is cut": lambda last, best: data(last, "state/d/*").write_bytes(b""),
    "an array file is gone": lambda last, best: data(last, "state/d/*").unlink(),
    "the masks have a flipped bit": lambda last, best: flip(data(last, "masks/d/*")),
    "the manifest is gone": lambda last, best: (last / "state/manifest.ocdbt").unlink(),
    "the record is gone": lambda last, best: shutil.rmtree(last / "record"),
    "the record is empty": lambda last, best: (last / "record/metadata").write_text("{}"),
    "the state is gone": lambda last, best: shutil.rmtree(last / "state"),
    "the metadata are no text": lambda last, best: (last / "_CHECKPOINT_METADATA").write_bytes(b"\xff\xfe"),
    "the metadata are gone": lambda last, best: (last / "_CHECKPOINT_METADATA").unlink(),
    "the checksums are cut": lambda last, best: (last / "checksums.json").write_text("{"),
    "the best has a flipped bit": lambda last, best: flip(data(best, "trained/d/*")),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_back_to_the_newest_whole_checkpoint(tmp_path, two, caplog, damage):
    """The damaged checkpoint is named and set aside; the one before it comes back, and may be followed by the same mark."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "last" / "2", tmp_path / "best" / "2")
    with checkpoints.opened(tmp_path) as store:
        assert checkpoints.latest(store)[0] == {"step": 1, "best": {"mark": 1}}
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(store, numbered(0)), numbered(1))
        checkpoints.save_best(store, 2, numbered(2))
        checkpoints.save(store, 2, numbered(2), MASKS, {"step": 2, "best": {"mark": 2}})
    assert f"{tmp_path / 'last' / '2'} is damaged" in caplog.text
    assert (tmp_path / "damaged" / "last_2").is_dir()
    with checkpoints.opened(tmp_path) as store:
        assert checkpoints.latest(store)[0]["step"] == 2


def test_newest_checkpoint_is_found_without_opening_the_series(tmp_path, two, caplog):
    """A damaged one is set aside; where there is none, no folder is created."""
    assert checkpoints.newest(tmp_path / "none") is None
    assert not [*tmp_path.iterdir()]
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    assert checkpoints.newest(tmp_path) == 2
    flip(data(tmp_path / "last" / "2", "state/d/*"))
    assert checkpoints.newest(tmp_path) == 1
    assert f"{tmp_path / 'last' / '2'} is damaged" in caplog.text


def test_no_whole_checkpoint_is_an_error(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for mark in "12":
        flip(data(tmp_path / "last" / mark, "state/d/*"))
    with pytest.raises(
        InputError, match=r"no checkpoint of this run is whole \(.*last/1: state/d.* other bytes .*last/2"
    ):
        checkpoints.opened(tmp_path).__enter__()
    assert not (tmp_path / "damaged").exists()


def test_a_lost_best_is_dropped_from_the_newest(tmp_path, two, caplog):
    """Where every best is damaged, the run goes on from the newest checkpoint and chooses the best again."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for mark in "12":
        flip(data(tmp_path / "best" / mark, "trained/d/*"))
    with checkpoints.opened(tmp_path) as store:
        assert checkpoints.latest(store)[0] == {"step": 2, "best": None}
    assert "lacks the best checkpoint" in caplog.text


def test_a_best_damaged_during_the_run_is_not_restored(tmp_path):
    with checkpoints.opened(tmp_path) as store:
        checkpoints.save_best(store, 1, numbered(1))
        store.best.wait_until_finished()
        flip(data(tmp_path / "best" / "1", "trained/d/*"))
        with pytest.raises(InputError, match="best/1 is damaged"):
            checkpoints.restore_best(store, 1, numbered(0))


def test_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, capfd):
    """A limit on the size of files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = {str(number): jax.random.normal(jax.random.key(number), (300, 4)) for number in range(20)}

    def save_two():
        with checkpoints.opened(tmp_path) as store:
            checkpoints.save(store, 1, many, {}, {"step": 1})
            store.last.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            checkpoints.save(store, 2, many, {}, {"step": 2})

    try:
        with pytest.raises(
            StoreError, match=f"{tmp_path}/last: a checkpoint could not be written: File too large, .* free"
        ):
            save_two()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err == ""
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # the writes that the failed save never began
    with checkpoints.opened(tmp_path) as store:
        assert checkpoints.latest(store)[0] == {"step": 1}


@pytest.mark.parametrize("failed", [False, True])
def test_writes_that_end_after_their_save_failed_are_not_reported(tmp_path, monkeypatch, failed):
    """Threads of TensorStore end such writes at any time, also after the store is closed."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=None)
    other = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=print)
    for _ in range(2):  # a second store does not wrap the hook of the first once more
        with contextlib.suppress(ValueError), checkpoints.opened(tmp_path):
            sys.unraisablehook(late)
            sys.unraisablehook(other)
            if failed:
                raise ValueError
    assert isinstance(sys.unraisablehook, functools.partial) == failed
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert reported == ([other] * 3 if failed else [other, other, late, other])
    if failed:
        assert not isinstance(sys.unraisablehook.args[0], functools.partial)


def test_a_checkpoint_without_checksums_is_whole(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    (tmp_path / "last/2/checksums.json").unlink()
    with checkpoints.opened(tmp_path) as store:
        assert checkpoints.latest(store)[0]["step"] == 2
