"""One writer of a folder at a time."""

import errno
import subprocess
import sys

import filelock
import pytest

from dsee_jax.errors import InputError
from dsee_jax.runtime import lock

HOLD = """
import pathlib, sys
from dsee_jax.runtime import lock
with lock.held(pathlib.Path(sys.argv[1]), "merge"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_writer_is_refused_and_a_killed_one_frees_the_lock(tmp_path):
    out = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="out: another merge writes this folder now"), lock.held(out, "merge"):
            raise AssertionError
        other.kill()
    with lock.held(out, "merge"):
        pass


def test_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with lock.held(tmp_path / "out", "merge"):
        assert "has no locks (No locks available): let no other merge write it" in caplog.text
