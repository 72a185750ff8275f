"""The folder of a run: bad places are one line before any work, and one run writes it at a time."""

import os
import shutil

import pytest

import runs
from dsee_jax.config import Config
from dsee_jax.errors import InputError
from dsee_jax.runtime import lock
from dsee_jax.train import loop
from dsee_jax.train.output_dir import check_output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dangling", "dangling is a symlink to nothing .*nowhere"),
        ("dangling/run", "dangling is a symlink to nothing"),
        ("loop", "Too many levels of symbolic links"),
        ("file/run", "file is a file; name a folder"),
        ("file", "file is a file; name a folder"),
        ("x" * 300, "File name too long"),
        ("x/" * 2000, "File name too long"),
        ("fill", "File name too long"),  # for the files of its checkpoints alone
        ("a\0b", "null byte"),
        ("~no_such_user/run", "no_such_user"),
    ],
)
def test_place_that_cannot_be_written_is_one_line(tmp_path, name, message):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.iterdir())
    name = "x/" * (2020 - len(str(tmp_path)) // 2) if name == "fill" else name
    place = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(InputError, match=message):
        check_output(Config(output_dir=place))
    assert sorted(tmp_path.iterdir()) == before


def test_read_only_place_is_one_line(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is replaced."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    with pytest.raises(InputError, match=f"output_dir {tmp_path}/a/run: {tmp_path} is read-only for you"):
        check_output(Config(output_dir=f"{tmp_path}/a/run"))


def test_disk_without_room_is_one_line(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"output_dir .*/run: needs about \d+ MiB, and its disk has 0 MiB free"):
        loop.run(runs.config(tmp_path), say=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_second_run_in_a_folder_is_refused(tmp_path):
    config = runs.config(tmp_path)
    with lock.held(tmp_path / "run", "run"), pytest.raises(InputError, match="run: another run writes this folder now"):
        loop.run(config, say=lambda text: None)
    assert not list((tmp_path / "run").iterdir())
