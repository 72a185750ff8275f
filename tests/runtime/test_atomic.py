"""Files and folders that are complete or absent: the old content until the rename, and a sync before the rename."""

import errno
import os
import pathlib
import stat

import pytest

from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic, files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_and_fail(path):
    path.write_text("new")
    raise KeyError


def test_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), atomic.file(tmp_path / "a") as partial:
        write_and_fail(partial)
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_file_is_synced_before_the_rename(tmp_path, syncs_and_renames):
    """A crash of the machine could leave an empty file under the name."""
    with atomic.file(tmp_path / "a") as partial:
        partial.write_text("12345")
    files.write_text(tmp_path / "b", "123")
    file = os.stat(tmp_path / "a").st_ino
    other = os.stat(tmp_path / "b").st_ino
    assert syncs_and_renames == [("synced", file, 5), ("renamed", file, 5), ("synced", other, 3), ("renamed", other, 3)]


def test_two_writers_of_a_file_leave_one_whole_file(tmp_path):
    with atomic.file(tmp_path / "a") as later:
        with atomic.file(tmp_path / "a") as first:
            later.write_text("later")
            first.write_text("first")
        assert (tmp_path / "a").read_text() == "first"
    assert (tmp_path / "a").read_text() == "later"
    assert names(tmp_path) == ["a"]


def full(path):
    """As a write to an open file fails on a full disk: without the name of the file."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("writer", [atomic.file, atomic.folder])
def test_full_disk_names_the_target(tmp_path, writer):
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'"),
        writer(tmp_path / "a") as partial,
    ):
        full(partial)
    assert names(tmp_path) == []


@pytest.mark.parametrize("old", [True, False])
def test_failed_write_keeps_the_old_folder(tmp_path, old):
    if old:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("old")
    with pytest.raises(KeyError), atomic.folder(tmp_path / "a") as partial:
        write_and_fail(partial / "x")
    assert names(tmp_path) == ["a"] * old
    assert not old or (tmp_path / "a" / "x").read_text() == "old"


def test_replaced_folder_has_only_new_files(tmp_path):
    """The new folder has only the new files, also after a killed process left some."""
    for name in ("a", ".a.partial", ".a.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("old")
    with atomic.folder(tmp_path / "a") as partial:
        (partial / "y").write_text("new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["y"]


def test_folder_is_synced_before_the_rename(tmp_path, syncs_and_renames):
    with atomic.folder(tmp_path / "a") as partial:
        (partial / "b").mkdir()
        (partial / "b" / "x").write_text("1")
    inodes = [os.stat(tmp_path / name).st_ino for name in ("a/b", "a/b/x", "a", "a", ".")]
    assert [(kind, inode) for kind, inode, _ in syncs_and_renames] == list(
        zip(["synced", "synced", "synced", "renamed", "synced"], inodes, strict=True)
    )


def test_existing_folder_needs_overwrite(tmp_path):
    with files.folder(tmp_path / "x" / "a") as partial:
        (partial / "y").write_text("1")
    with pytest.raises(InputError, match="a exists: give a new folder"), files.folder(tmp_path / "x" / "a"):
        pass
    with pytest.raises(InputError, match="'y' in it is not a file"), files.folder(tmp_path / "x" / "a", replaces=["z"]):
        pass
    with files.folder(tmp_path / "x" / "a", replaces=["y"]):
        pass
    assert not names(tmp_path / "x" / "a")


def test_folder_lost_between_two_renames_is_restored(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("former")
    replace = pathlib.Path.replace

    def failing(self, path):
        if self.name.endswith(".partial"):
            raise OSError("disk gone")
        return replace(self, path)

    monkeypatch.setattr(pathlib.Path, "replace", failing)
    with pytest.raises(OSError, match="disk gone"), atomic.folder(target) as folder:
        (folder / "file").write_text("new")
    assert (target / "file").read_text() == "former"
    monkeypatch.undo()
    target.replace(atomic.hidden(target, "old"))  # as a kill between the renames leaves it
    with pytest.raises(RuntimeError), atomic.folder(target):
        raise RuntimeError
    assert (target / "file").read_text() == "former"


def test_file_system_that_syncs_no_folders_is_accepted(tmp_path, monkeypatch):
    sync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no sync of folders")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with atomic.folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "target" / "file").read_text() == "new"
